"""What a run has come to: scores, what they are to be compared with, sizes, and how it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import Trainer

from sparsepeft.backbones import describe_backbone
from sparsepeft.launch import is_first, num_processes
from sparsepeft.methods.models import backbone_bytes, count_parameters
from sparsepeft.methods.saving import round_weights, write_weights
from sparsepeft.methods.sparse import by_infer, count_routers, describe
from sparsepeft.paths import without_folders
from sparsepeft.provenance import environment
from sparsepeft.runs.config import LM, RunConfig
from sparsepeft.runs.config_values import SELECTION
from sparsepeft.runs.corpus import num_predicted
from sparsepeft.runs.files import HISTORY, RESULTS_VERSION, THRESHOLDS
from sparsepeft.runs.history import read_lines
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.metrics import report
from sparsepeft.training.data import LabelledData, TextData
from sparsepeft.training.fit import Fitted, answers_of
from sparsepeft.training.loss import TaskLoss
from sparsepeft.training.model import RunModel, Scores, text_scores
from sparsepeft.training.processes import from_first
from sparsepeft.training.thresholds import thresholds_by

_ERRORS = ("mae", "rmse")
_NOT_SHARED = ("output_dir", "data_dir", "model", "text", "validation_text", "device", "report_to")  # of a config


def save_and_score(
    config: RunConfig, data: LabelledData | TextData, built: RunModel, fitted: Fitted, work: Path
) -> dict[str, Any]:
    """Save the weights in the folder ``work`` and score them as they were saved: the content of ``results.json``.

    ``score`` is the main metric on the test part if there is one, or else on what was scored (the validation set, or
    the part of the training data that ``score_on`` asked for).

    Raises:
        RunFailed: the weights could not be written.
    """
    trainer, sparse = fitted.trainer, built.sparsification
    saved_bytes = _save(config, data, built, fitted, work)
    if isinstance(data, LabelledData):
        scored = _score_labelled(config, data, built, fitted)
    else:
        scored = _score_text(config, data, built)
    metrics = scored["metrics"]
    split = scored_part(metrics)
    results = {
        "format_version": RESULTS_VERSION,
        "task": data.spec.name if isinstance(data, LabelledData) else LM,
        "method": config.method,
        "recipe": config.recipe,
        "seed": config.seed,
        "score": metrics[split][scored["main_metric"]],
        "score_split": split,
        **scored,
        "saved_bytes": saved_bytes,
        "model_bytes": backbone_bytes(built.model),
        "model": describe_backbone(data.model),
        "train_seconds": round(max(fitted.seconds, _seconds_so_far(work)), 1),
        "others_cpu_share": fitted.others_share,
        "processes": num_processes(),
        "steps": int(trainer.state.global_step),
        "hyperparameters": hyperparameters(config, data, trainer),
        "environment": environment(),
        "notes": list(data.notes),
        "data_fingerprints": dict(data.fingerprints),
        "config": shared_values(config),
    }
    if sparse is not None:
        results["spt"] = describe(sparse)
    return results


def _seconds_so_far(work: Path) -> float:
    """Of training, by its history, which a run that was interrupted has whole, without the pauses."""
    history = read_lines(work / HISTORY)
    return history[-1]["seconds"] if history else 0.0


def _save(config: RunConfig, data: LabelledData | TextData, built: RunModel, fitted: Fitted, work: Path) -> int:
    """Save the weights, by the first process; all have them as they were saved. Returns bytes."""
    whole = fitted.trainer.whole_state_dict()
    saved = from_first(lambda: write_weights(work, built.model, data.tokenizer, config.save_dtype, whole))
    if config.save_dtype is not None and not is_first():
        round_weights(work, built.model, config.save_dtype)
    return saved


def _score_labelled(config: RunConfig, data: LabelledData, built: RunModel, fitted: Fitted) -> dict[str, Any]:
    trainer, spec = fitted.trainer, data.spec
    is_choosing = spec.multi_label and config.thresholds == SELECTION and data.selection is not None
    thresholds = thresholds_by(spec, config, _answer(trainer, data.selection) if is_choosing else None)
    answers = by_infer(built.model, lambda: {name: _answer(trainer, part) for name, part in data.reported.items()})
    scores = {
        infer: {name: spec.compute_metrics(*answer, thresholds) for name, answer in parts.items()}
        for infer, parts in answers.items()
    }
    own = next(iter(answers.values()))
    reports = {name: describe_scores(spec, *answer, thresholds) for name, answer in own.items()}
    split = scored_part(own)
    parameters = count_parameters(built.model)
    if built.sparsification is not None:
        parameters["routers"] = count_routers(built.model)
    adapter = built.model.peft_config["default"] if isinstance(built.model, PeftModel) else None
    formula = getattr(adapter, "formula", None)
    return {
        "main_metric": spec.main_metric,
        **_metrics(scores),
        **({} if thresholds is None else _beside_half(spec, own, thresholds)),
        "report": reports[split],
        "reports": reports,
        "baseline": baseline(spec, own[split][1], data.labels),
        "problem_type": spec.problem_type,
        "num_texts": len(spec.text_columns),
        "num_rows": data.sizes,
        "num_train": data.sizes["training"],
        "num_cut": data.num_cut,
        "parameters": parameters,
        "best_step": trainer.state.best_global_step,
        "selection_score": trainer.state.best_metric,
        "data_source": data.source,
        **({} if formula is None else {"formula": formula}),
    }


def _answer(trainer: Trainer, part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels."""
    trainer.compute_metrics = None  # which knows the part that checkpoints were chosen on
    return answers_of(trainer.predict(part), part)


def _beside_half(spec: TaskSpec, answers: dict[str, Any], thresholds: Sequence[float]) -> dict[str, Any]:
    """Thresholds by label, and the metrics of all parts without them."""
    return {
        THRESHOLDS: dict(zip(spec.label_names or (), thresholds, strict=True)),
        "metrics_at_half": {name: spec.compute_metrics(*answer) for name, answer in answers.items()},
    }


def _metrics(scores: dict[str, dict[str, Scores]]) -> dict[str, Any]:
    """Metrics of all parts, and beside them those of the other way in which a sparse model can answer."""
    return {"metrics": next(iter(scores.values())), **({"metrics_by_infer": scores} if len(scores) > 1 else {})}


def _score_text(config: RunConfig, data: TextData, built: RunModel) -> dict[str, Any]:
    return {
        "main_metric": "perplexity",
        **_metrics(by_infer(built.model, lambda: {"validation": text_scores(config, built.model, data)})),
        "before": built.before,
        "spt": None,
        "parameters": {"trained": count_parameters(built.model)["trained"], "routers": count_routers(built.model)},
        "block_length": data.max_length,
        "bos_token": None if data.begin is None else data.tokenizer.convert_ids_to_tokens(data.begin),
        "num_train_tokens": num_predicted(data.train),
        "num_validation_tokens": num_predicted(data.reported["validation"]),
    }


def scored_part(parts: Container[str]) -> str:
    """The part that a run's one score is about: the test part where there is one."""
    return next(name for name in ("test", "validation", "selection") if name in parts)


def describe_scores(
    spec: TaskSpec, logits: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] | None = None
) -> dict[str, Any]:
    """How a part's score came about: :func:`sparsepeft.tasks.metrics.report`, or the errors of a regression.

    Args:
        logits, labels: of the part, (N, C) and (N,) or (N, C).
        thresholds: see :meth:`sparsepeft.tasks.TaskSpec.compute_metrics`.
    """
    if spec.label_names is None:
        return _errors(spec).compute_metrics(logits, labels)
    return report(spec, logits, labels, thresholds)


def baseline(spec: TaskSpec, labels: np.ndarray, trained_on: np.ndarray) -> dict[str, Any]:
    """What to compare a part's scores with.

    Args:
        labels: of the part that is scored, (N,) or (N, C); (N, T) where tokens are labelled.
        trained_on: the labels of the training examples, or of all their tokens.

    Returns:
        The ``answer`` that is most frequent in training, or the mean for a regression, and the ``metrics`` of giving it
        always. Where several labels may hold, it is those of more than half of the examples; without such, the most
        frequent one.
    """
    answer: Any
    if spec.label_names is None:
        answer = float(trained_on.mean())
        return {"answer": answer, "metrics": _errors(spec).compute_metrics(np.full((len(labels), 1), answer), labels)}
    if trained_on.ndim == 2:
        shares = trained_on.mean(axis=0)
        row = np.where(shares > 0.5, 1.0, -1.0)
        row[shares.argmax()] = 1.0
        answer = [name for name, value in zip(spec.label_names, row, strict=True) if value > 0]
    else:
        row = np.bincount(trained_on.astype(int), minlength=spec.num_labels).astype(float)
        answer = spec.label_names[int(row.argmax())]
    shape = labels.shape if spec.labels_tokens else labels.shape[:1]
    return {"answer": answer, "metrics": spec.compute_metrics(np.broadcast_to(row, (*shape, len(row))), labels)}


def _errors(spec: TaskSpec) -> TaskSpec:
    """A regression, scored by its errors."""
    return dataclasses.replace(spec, metrics=_ERRORS, main_metric="mae")


def shared_values(config: RunConfig) -> dict[str, Any]:
    """A config's values for a result file: nothing that names a folder of this machine, or where it computed."""
    return {key: value for key, value in without_folders(config.to_dict()).items() if key not in _NOT_SHARED}


def hyperparameters(config: RunConfig, data: LabelledData | TextData, trainer: Trainer) -> dict[str, Any]:
    """What a run was trained with, by the names of ``transformers.TrainingArguments``: nothing is left to defaults."""
    recipe, arguments, loss = config.recipe_values(), trainer.args, trainer.compute_loss_func
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
        "optimizer": _optimizer(trainer),
        "precision": config.precision,
        "seed": config.seed,
    }
    if isinstance(data, LabelledData):
        values |= {
            "max_length": data.max_length,
            "eval_steps": arguments.eval_steps,
            "early_stopping_patience": config.early_stopping_patience,
        } | ({"thresholds": config.thresholds} if data.spec.multi_label else {})
    else:
        values |= {"block_length": data.max_length}
    if isinstance(loss, TaskLoss):
        values |= {"label_smoothing_factor": loss.label_smoothing_factor}
        if loss.weights is not None and isinstance(data, LabelledData):
            weights = [round(float(weight), 6) for weight in loss.weights]
            values |= {"class_weights": dict(zip(data.spec.label_names or (), weights, strict=True))}
    values |= recipe.own_learning_rates()
    return values | ({"adapter": dict(recipe.adapter)} if recipe.adapter else {})


def _optimizer(trainer: Trainer) -> str:
    """By transformers' name, or by that of its class if it is another one."""
    if trainer.optimizer_cls_and_kwargs is not None:
        return trainer.optimizer_cls_and_kwargs[0].__name__
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))
