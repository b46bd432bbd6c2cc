"""Memories that a federation trains: the Flower app in ``examples/federated``, on BBC News.

    python -m sparsepeft_research.experiments.federated --data-dir DATA

Five clients hold a topic each, or a random fifth of the texts each. For both: the federation's accuracy by round, on
the test part, which no client has; that of central training on all clients' texts, with as many steps as all clients
take together; and that of each client alone, on its own texts, with as many steps as it takes in the federation.
Beside it, what a client receives and sends in a round, measured on the messages, for SPARTAN, LoRA and full
fine-tuning.

The clients take turns in this process. The result is ``research/results/federated.json``; its parts are kept in a
folder ``federated/work`` beside it, what is there is not repeated, and several processes may share the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sparsepeft.provenance import environment
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS, ROOT, Result, describe_machine, write_result

APP = ROOT / "examples" / "federated"
# By partition, what is tried: what differs from FedAvg. Rounds cut in three are three times as many with a third of the
# local work, so that clients take equally many steps.
STRATEGIES: dict[str, dict[str, dict[str, Any]]] = {
    "random": {"FedAvg": {}},
    "topic": {
        "FedAvg": {},
        "FedAvgM": {"server_momentum": 0.5},
        "FedProx": {"proximal_mu": 0.1},
        "FedAvg, rounds cut in three": {"cut_in": 3},
        "FedAvgM of 0.9, rounds cut in three": {"cut_in": 3, "server_momentum": 0.9},
    },
}
SENT = ("spartan", "lora", "full")


def main() -> None:
    """Run what is missing, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="with bbc-news; without it the built-in topics are taken")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-3, help="high, as there are few steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--max-train-samples", type=int, default=500, help="of all clients together; 0 is all")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--file", type=Path, default=RESULTS / "federated.json", help="of the result")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    run(options.pop("file"), **options)


def run(file: Path, **settings: Any) -> Result | None:
    """Measure what is missing, and write the result file.

    Args:
        file: the result; parts go to a folder ``work`` in the folder of its name.
        settings: the options of :func:`main`, all of them.

    Returns:
        The result; None while another process is at a part of it.
    """
    made_on = describe_machine(settings["seed"])
    num_clients, rounds = settings.pop("clients"), settings.pop("rounds")
    data_dir = settings.pop("data_dir")
    values = settings | {"task": "topics" if data_dir is None else "bbc-news", "data_dir": data_dir or ""}
    parts: dict[str, Any] = {}

    def part(name: str, measure: Any, *arguments: Any) -> None:
        path = file.with_suffix("") / "work" / f"{name}.json"
        run_once(
            path, lambda: measure(num_clients, values, *arguments) | {"environment": environment()}, {"name": name}
        )
        parts[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    for partition, strategies in STRATEGIES.items():
        for strategy, changes in strategies.items():
            cut_in = changes.get("cut_in", 1)
            work = {"num_rounds": rounds * cut_in, "local_epochs": values["local_epochs"] / cut_in}
            others = {name: value for name, value in changes.items() if name != "cut_in"}
            part(f"{partition}-{strategy}", federation, {"partition": partition} | work | others)
    part("central", central, rounds)
    for partition in STRATEGIES:
        part(f"{partition}-alone", alone, partition, rounds)
    for method in SENT:
        part(f"bytes-{method}", federation, {"method": method, "num_rounds": 2, "max_train_samples": 10 * num_clients})
    if waiting := [name for name, measured in parts.items() if measured is None]:
        print(f"{', '.join(waiting)}: another process is at it; repeat the command when it has ended")
        return None
    described = settings | {"task": values["task"], "clients": num_clients, "rounds": rounds, "model": "minilm"}
    result = Result("federated", described, parts, made_on, settings["seed"])
    write_result(file, result)
    return result


def federation(num_clients: int, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A federation's ``federation.json``; clients do not score, the server does."""
    merged = {"partition": "random", "fraction_evaluate": 0.0} | values | changes
    return _module("in_process").run_in_process(num_clients, **merged)


def central(num_clients: int, values: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Training on all clients' texts in one place."""
    task = _task(values)
    return _trained(task, task.data.train, rounds * values["local_epochs"], values["seed"])


def alone(num_clients: int, values: dict[str, Any], partition: str, rounds: int) -> dict[str, Any]:
    """Training of each client on its own texts."""
    task, clients = _task(values), []
    for index in range(num_clients):
        rows = _module("task").client_rows(task, task.data.train, partition, index, num_clients)
        clients.append(_trained(task, rows, rounds * values["local_epochs"], values["seed"] + index))
    return {"clients": clients}


def _trained(task: Any, rows: Any, epochs: float, seed: int) -> dict[str, Any]:
    """Train from the weights that a federation begins with."""
    app = _module("task")
    app.receive(task.built.model, task.initial)
    steps = app.train(task, rows, epochs, seed)
    return {"num_rows": len(rows), "steps": steps, "test": app.score(task, task.data.reported["test"])}


def _task(values: dict[str, Any]) -> Any:
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return _module("task").load(_module("in_process").default_values() | named)


def _module(name: str) -> Any:
    """A module of the app, which is no part of this package."""
    if str(APP) not in sys.path:
        sys.path.insert(0, str(APP))
    return importlib.import_module(f"federated_memories.{name}")


if __name__ == "__main__":
    main()
