"""What results say beside scores: each class's, what a constant answer has, the resolved hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import Trainer

from sparsepeft.methods.recipes import Recipe
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.lm_config import LanguageModelConfig
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.metrics import report
from sparsepeft.training.loss import TaskLoss

_ERRORS = ("mae", "rmse")


def describe_scores(spec: TaskSpec, logits: np.ndarray, labels: np.ndarray, trained_on: np.ndarray) -> dict[str, Any]:
    """What to compare a part's scores with.

    Args:
        spec: the task.
        logits, labels: of the part that is scored, (N, C) and (N,) or (N, C).
        trained_on: the labels of the training examples.

    Returns:
        ``report``: :func:`sparsepeft.tasks.metrics.report`, or mean absolute and root mean square error of a
        regression. ``baseline``: the ``answer`` that is most frequent in training, or the mean for a regression, and
        the ``metrics`` of giving it always.
    """
    answer: Any
    if spec.label_names is None:
        answer = float(trained_on.mean())
        constant = np.full((len(labels), 1), answer)
        errors = dataclasses.replace(spec, metrics=_ERRORS, main_metric="mae")
        described = errors.compute_metrics(logits, labels)
        scores = errors.compute_metrics(constant, labels)
    else:
        if trained_on.ndim == 2:
            row = np.where(trained_on.mean(axis=0) > 0.5, 1.0, -1.0)
            answer = [name for name, value in zip(spec.label_names, row, strict=True) if value > 0]
        else:
            row = np.bincount(trained_on.astype(int), minlength=spec.num_labels).astype(float)
            answer = spec.label_names[int(row.argmax())]
        described = report(spec, logits, labels)
        scores = spec.compute_metrics(np.tile(row, (len(labels), 1)), labels)
    return {"report": described, "baseline": {"answer": answer, "metrics": scores}}


def hyperparameters(
    config: RunConfig | LanguageModelConfig,
    recipe: Recipe,
    trainer: Trainer,
    label_names: Sequence[str] | None = None,
    **own: Any,
) -> dict[str, Any]:
    """What a run was trained with, by the names of ``transformers.TrainingArguments``: nothing is left to defaults.

    Args:
        config: the run's.
        recipe: the config's, with its own values put in.
        trainer: that trained.
        label_names: by class index, where there are any.
        **own: further values, such as ``max_length``.
    """
    arguments, loss = trainer.args, trainer.compute_loss_func
    values = {
        "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "max_steps": trainer.state.max_steps,
        "warmup_steps": int(arguments.warmup_steps),
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "precision": config.precision,
        "seed": config.seed,
        **own,
    }
    if isinstance(config, RunConfig):
        values |= {"eval_steps": arguments.eval_steps, "early_stopping_patience": config.early_stopping_patience}
    if isinstance(loss, TaskLoss):
        values |= {"label_smoothing_factor": loss.label_smoothing_factor}
        if loss.weights is not None:
            weights = [round(float(weight), 6) for weight in loss.weights]
            values |= {"class_weights": dict(zip(label_names or (), weights, strict=True))}
    return values | ({"adapter": dict(recipe.adapter)} if recipe.adapter else {})
