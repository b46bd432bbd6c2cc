"""The server: averages what clients send, scores the average on texts that no client has, and saves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedProx, Result

from federated_memories.task import Task, Values, load, receive, score
from sparsepeft.arguments import check_whole
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import replacing, write_json
from sparsepeft.methods.models import count_parameters
from sparsepeft.methods.saving import write_weights
from sparsepeft.runs.files import RUN, describe_run
from sparsepeft.runs.folder import check_output_folder
from sparsepeft.runs.held_out import write_held_out

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of a federation."""
    values = context.run_config
    check_whole("num-rounds", values["num-rounds"])
    if folder := values["output-dir"]:
        if not Path(folder).is_absolute():  # Flower runs apps from folders of its own
            raise UserError(f"`output-dir={folder}` was given, but it must be an absolute path.")
        check_output_folder(Path(folder), overwrite=True)
    task, num_rounds = load(values), values["num-rounds"]

    def score_average(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        receive(task.built.model, arrays.to_torch_state_dict())
        return MetricRecord(score(task, task.data.reported["test"]))

    result = strategy_of(values).start(
        grid=grid,
        initial_arrays=ArrayRecord(task.initial),
        num_rounds=num_rounds,
        evaluate_fn=score_average,
    )
    if len(result.train_metrics_clientapp) < num_rounds:
        raise RunFailed("There were rounds that no client finished; the errors above say why.")
    if folder:
        receive(task.built.model, result.arrays.to_torch_state_dict())
        save(task, values, summary(task, values, result))


def strategy_of(values: Values) -> FedAvg:
    """How clients are chosen and what becomes of their weights.

    Raises:
        UserError: two strategies are asked for.
    """
    num_clients, momentum, mu = values["num-clients"], values["server-momentum"], values["proximal-mu"]
    settings: dict[str, Any] = {
        "min_available_nodes": num_clients,
        "min_train_nodes": num_clients,
        "min_evaluate_nodes": num_clients if values["fraction-evaluate"] else 0,
        "fraction_evaluate": float(values["fraction-evaluate"]),
    }
    if momentum and mu:
        raise UserError("`server-momentum` and `proximal-mu` were given, which belong to two strategies; pass one.")
    if momentum:
        return FedAvgM(**settings, server_momentum=momentum)
    return FedProx(**settings, proximal_mu=mu) if mu else FedAvg(**settings)


def summary(task: Task, values: Values, result: Result) -> dict[str, Any]:
    """What came of a federation, by round."""
    parts = {
        "train": result.train_metrics_clientapp,  # means over the clients, by examples
        "evaluate": result.evaluate_metrics_clientapp,
        "test": result.evaluate_metrics_serverapp,
    }
    return {
        "values": dict(values) | {"data-dir": "", "output-dir": ""},
        "parameters": count_parameters(task.built.model),
        "tensors": len(task.initial),
        **{part: {str(number): dict(metrics) for number, metrics in rounds.items()} for part, rounds in parts.items()},
    }


def save(task: Task, values: Values, described: dict[str, Any]) -> None:
    """Write a folder as ``sparsepeft train`` leaves it, which ``sparsepeft predict`` and PEFT read."""
    folder, epochs = Path(values["output-dir"]), values["num-rounds"] * values["local-epochs"]
    config = dataclasses.replace(task.config, output_dir=str(folder), epochs=epochs)
    with replacing(folder) as work:
        write_weights(work, task.built.model, task.data.tokenizer, None)
        write_json(work / RUN, describe_run(config) | task.data.run_values | task.built.run_values)
        write_held_out(work, task.data.held_out)
        write_json(work / "federation.json", described)
