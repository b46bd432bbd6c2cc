"""The loss of a task where the model's own does not do: class weights, label smoothing, several batches in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.launch import num_processes
from sparsepeft.runs.config import RunConfig
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.labels import LabelReader
from sparsepeft.tasks.token_metrics import NO_TOKEN

_MULTI_LABEL = "multi_label_classification"


@dataclass(frozen=True)
class TaskLoss:
    """A loss for ``compute_loss_func`` of ``transformers.Trainer``, the mean over all batches that make a step.

    Cross entropy of single labels and of tokens, binary cross entropy of several labels, squared error of values. Class
    weights are those of ``torch.nn.CrossEntropyLoss(weight=...)``, by whose sum the loss is divided, and ``pos_weight``
    for several labels.

    Attributes:
        problem_type: as in :class:`sparsepeft.tasks.TaskSpec`.
        weights: (C,) or None.
        label_smoothing_factor: as in ``transformers.TrainingArguments``.
    """

    problem_type: str
    weights: Tensor | None = None
    label_smoothing_factor: float = 0.0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """A scalar.

        Args:
            outputs: of the model, with ``logits`` (B, C), or (B, T, C) where tokens are labelled.
            labels: (B,), (B, C) for several labels, or (B, T) with -100 where there is no token.
            num_items_in_batch: :meth:`count` over all batches of the step; None for this one alone.
        """
        logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
        weights = None if self.weights is None else self.weights.to(logits.device)
        if self.problem_type == "regression":
            total = F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        elif self.problem_type == _MULTI_LABEL:
            total = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights, reduction="sum")
        else:
            smoothing = self.label_smoothing_factor
            logits, labels = logits.flatten(0, -2), labels.flatten()
            total = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum")
        return total / (self.count([labels]) if num_items_in_batch is None else num_items_in_batch).to(logits.device)

    def count(self, labels: Sequence[Tensor]) -> Tensor:
        """What the sum over some batches is divided by for the mean: their labels, each by its weight."""
        if self.weights is None or self.problem_type == _MULTI_LABEL:
            counted = (each.numel() if each.is_floating_point() else (each != NO_TOKEN).sum() for each in labels)
            return torch.tensor(float(sum(counted)))
        return torch.stack([self.weights.to(each.device)[each[each != NO_TOKEN]].sum() for each in labels]).sum()


def check_loss(spec: TaskSpec, config: RunConfig) -> None:
    """See that a task has what its loss is to be changed by.

    Raises:
        UserError: the task has no classes to weight or to smooth, or not the labels named.
    """
    class_weights = config.class_weights
    values = {"class_weights": class_weights, "label_smoothing_factor": config.label_smoothing_factor or None}
    for name, value in values.items():
        if value is not None and spec.label_names is None:
            raise UserError(
                f"`{name}` was given, but the task {spec.name} is a regression, without classes; leave it out."
            )
    if config.label_smoothing_factor and spec.problem_type == _MULTI_LABEL:
        raise UserError(
            f"`label_smoothing_factor` was given, but the examples of {spec.name} have several labels each; leave it "
            "out."
        )
    names = spec.label_names or ()
    for label in _by_name(class_weights, names) if isinstance(class_weights, Mapping) else ():
        if label not in names:
            hint = (
                " YAML reads yes, no, on and off so, unless they are in quotes." if label in ("true", "false") else ""
            )
            raise UserError(unknown_name("`class_weights`: the label", label, names) + hint)


def task_loss(spec: TaskSpec, labels: Sequence[Any] | np.ndarray, config: RunConfig) -> TaskLoss | None:
    """The loss that a run's options ask for, which :func:`check_loss` has seen; None where the model's own does.

    Where there are several batches in a step, one after the other or in several processes, models differ in whether
    their loss is a mean over one batch or over all of them; this one always is the latter.

    Args:
        spec: the task.
        labels: of the training examples, or of all their tokens: class indices (N,), or (N, C) of 0 and 1.
        config: of the run; labels that its ``class_weights`` do not name have weight 1.
    """
    class_weights, smoothing = config.class_weights, config.label_smoothing_factor or 0.0
    num_batches = config.gradient_accumulation_steps * num_processes()
    if class_weights is None and not smoothing and num_batches == 1:
        return None
    weights = None if class_weights is None else torch.tensor(_weights(spec, np.asarray(labels), class_weights))
    return TaskLoss(spec.problem_type, weights, smoothing)


def _weights(spec: TaskSpec, labels: np.ndarray, class_weights: str | Mapping[str, float]) -> list[float]:
    names = spec.label_names or ()
    if isinstance(class_weights, str):
        if labels.ndim == 2:  # as many positives as negatives
            positive = labels.sum(axis=0)
            return ((len(labels) - positive) / np.maximum(positive, 1)).clip(min=1 / len(labels)).tolist()
        counts = np.bincount(labels.astype(int), minlength=len(names))
        balanced = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        # Of a class that no row has, smoothing would make the most important one.
        return np.where(counts, balanced, 1.0).tolist()
    by_name = _by_name(class_weights, names)
    return [by_name.get(name, 1.0) for name in names]


def _by_name(class_weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Weights by the task's names of the labels, which may be written as in its files."""
    name_of = LabelReader.for_names(names).name_of
    return {name_of(label): float(weight) for label, weight in class_weights.items()}
