"""What clients and server share: the task, its parts, and the tensors that travel."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback

from sparsepeft.arguments import check_choice
from sparsepeft.errors import UserError
from sparsepeft.methods.models import Model
from sparsepeft.runs.config import RunConfig
from sparsepeft.training.data import LabelledData, prepare_data
from sparsepeft.training.fit import answers_of, fit, training_arguments
from sparsepeft.training.model import RunModel, build_model

PARTITIONS = ("topic", "random")
Values = Mapping[str, Any]  # of [tool.flwr.app.config], as they were overridden
_OF_TASK = (
    *("task", "data-dir", "method", "lr", "batch-size", "max-length", "max-train-samples", "precision", "seed"),
)


class Task(NamedTuple):
    """What is learned, and where every run starts from.

    Attributes:
        config: how clients train.
        data: encoded.
        built: the model that clients train, and the server scores, in turn.
        initial: its tensors that travel, before any training.
    """

    config: RunConfig
    data: LabelledData
    built: RunModel
    initial: dict[str, torch.Tensor]


def load(values: Values) -> Task:
    """The task that a run's values name; once in a process, as simulated clients take turns in it.

    Raises:
        UserError: a value cannot be used.
    """
    return _load(*(values[name] for name in _OF_TASK))


@cache
def _load(*values: Any) -> Task:
    named = dict(zip(_OF_TASK, values, strict=True))
    config = RunConfig(
        task=named["task"],
        output_dir="federated",
        method=named["method"],
        data_dir=named["data-dir"] or None,
        learning_rate=named["lr"],
        lr_scheduler_type="constant",  # another would fall to nothing in every round
        batch_size=named["batch-size"],
        max_length=named["max-length"],
        max_train_samples=named["max-train-samples"] or None,
        eval_steps=10**9,  # one checkpoint, at the end
        precision=named["precision"],
        seed=named["seed"],
        # Memories and head alone; the recipe trains the backbone's LayerNorms, too.
        settings={"train_layer_norms": False} if named["method"] == "spartan" else {},
    )
    data = prepare_data(config)
    if not isinstance(data, LabelledData) or data.spec.problem_type != "single_label_classification":
        raise UserError(f"`task={config.task}` was given, but clients share out texts that have one label each.")
    if "test" not in data.reported:
        raise UserError(f"`task={config.task}` was given, but it has no test part to score the average on.")
    built = build_model(config, data)
    return Task(config, data, built, {name: tensor.clone() for name, tensor in travelling(built.model).items()})


def part_of(labels: Sequence[int], num_labels: int, partition: str, index: int, count: int, seed: int) -> list[int]:
    """Rows of one of ``count`` clients; all clients' together are all rows, each once.

    By topic, client ``i`` has the labels ``i``, ``i + count``, ...: one label each where there are as many clients as
    labels. Further clients share those of the first. At random, all have like many rows, whatever their labels.

    Args:
        labels: class indices of all rows.
        num_labels: classes that there are.
        partition: one of :data:`PARTITIONS`.
        index, count: which client of how many.
        seed: decides who has which rows.

    Raises:
        UserError: there is no such client, or nothing is left for it.
    """
    if not 0 <= index < count:
        raise UserError(f"`partition-id={index}` was given, but there are {count} clients; pass 0 to {count - 1}.")
    check_choice("partition", partition, PARTITIONS)
    classes, order = np.asarray(labels), np.random.default_rng(seed).permutation(len(labels))
    first, sharing = index, count
    if partition == "topic":
        first, sharing = index // num_labels, len(range(index % num_labels, count, num_labels))
        order = order[classes[order] % count == index % num_labels]
    rows = sorted(order[first::sharing].tolist())
    if not rows:
        raise UserError(
            f"No rows are left for client {index} of {count}, of {len(classes)} in all; pass fewer clients."
        )
    return rows


def client_rows(task: Task, rows: Any, partition: str, index: int, count: int) -> Any:
    """A client's part of rows of the task."""
    chosen = part_of(rows["labels"][:], task.data.spec.num_labels, partition, index, count, task.config.seed)
    return rows.select(chosen)


def travelling(model: Model) -> dict[str, torch.Tensor]:
    """The tensors that clients and server send each other: the adapter's and the head's, or all of a full model."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return model.state_dict()


def receive(model: Model, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors that have arrived into a model."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, tensors)
    else:
        model.load_state_dict(tensors)


def train(task: Task, rows: Any, epochs: float, seed: int, proximal_mu: float = 0.0) -> int:
    """Train the task's model on rows, from the weights that it has.

    Returns:
        Steps that were taken.
    """
    config = dataclasses.replace(task.config, epochs=epochs, seed=seed)
    data = dataclasses.replace(task.data, train=rows, selection=None)
    with tempfile.TemporaryDirectory() as work:
        fitted = fit(config, data, task.built, Path(work), [Proximal(proximal_mu)] if proximal_mu else [])
    return int(fitted.trainer.state.global_step)


def score(task: Task, rows: Any) -> dict[str, float]:
    """The task's metrics on rows."""
    with tempfile.TemporaryDirectory() as work:
        arguments = training_arguments(task.config, dataclasses.replace(task.data, selection=None), Path(work))
        trainer = Trainer(task.built.model, arguments, data_collator=task.data.collator)
        return task.data.spec.compute_metrics(*answers_of(trainer.predict(rows), rows))


class Proximal(TrainerCallback):
    """FedProx (arXiv:1812.06127): the gradient of mu/2 |w - w_t|^2, where w_t are the weights that were received."""

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.received: list[torch.Tensor] = []

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.received = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter, received in zip(trained, self.received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=self.mu)
