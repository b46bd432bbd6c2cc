"""Metrics from logits: shares of right answers, F1, correlations and errors, never NaN and never a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparsepeft.errors import TaskError
from sparsepeft.extras import require
from sparsepeft.tasks import token_metrics
from sparsepeft.tasks.thresholds import cuts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sparsepeft.tasks.spec import TaskSpec

Metric = Callable[[Any, Any], float]  # of answers and truths, NumPy arrays

_MEANS: Final = {"accuracy_f1": ("accuracy", "f1"), "pearson_spearman": ("pearson", "spearman")}
_WORST: Final = 3.4e38  # stands for outputs that are not finite: the largest that float32 holds


def compute(
    spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] | None = None
) -> dict[str, float]:
    """Score logits; see `TaskSpec.compute_metrics`."""
    if spec.labels_tokens:
        return token_metrics.compute(spec, predictions, labels)
    guess, truth = _answers(spec, predictions, labels, thresholds)
    known = _MULTI_LABEL if spec.multi_label else _METRICS
    scores = {name: known[name](guess, truth) for name in spec.metrics}
    if spec.main_metric not in scores:
        parts = _MEANS.get(spec.main_metric, spec.metrics)
        scores[spec.main_metric] = sum(scores[name] for name in parts) / len(parts)
    return scores


def report(
    spec: TaskSpec, logits: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] | None = None
) -> dict[str, Any]:
    """Scores for each label of a classification.

    Args:
        logits: (N, C); (N, T, C) where tokens are labelled.
        labels: class indices, (N,); for a multi-label task ones and zeros, (N, C); where tokens are labelled (N, T),
            with -100 for what is no token.
        thresholds: of a multi-label task, see `TaskSpec.compute_metrics`.

    Returns:
        What JSON can hold. ``per_class``: for each label, in order, ``precision``, ``recall``, ``f1`` and ``support``
        (how many rows have it). ``confusion_matrix``: counts by true label (row) and predicted label (column), both in
        the order of ``per_class``; rows with a NaN are in none. A multi-label task has no such matrix, nor has
        one of entities, whose ``per_class`` is by their types; for regression the report is empty.

    Raises:
        TaskError: shapes do not fit each other or the task, or there are no rows.
    """
    if spec.labels_tokens:
        return token_metrics.report(spec, logits, labels)
    guess, truth = _answers(spec, logits, labels, thresholds)
    if spec.label_names is None:
        return {}
    metrics = require("sklearn.metrics", "train", "A report by class")
    classes = list(range(spec.num_labels))
    columns = metrics.precision_recall_fscore_support(truth, guess, labels=classes, zero_division=0.0)
    per_class = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for name, precision, recall, f1, support in zip(spec.label_names, *columns, strict=True)
    }
    if spec.multi_label:
        return {"per_class": per_class}
    return {"per_class": per_class, "confusion_matrix": metrics.confusion_matrix(truth, guess, labels=classes).tolist()}


def _answers(
    spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and labels as values or classes (N,), or (N, C) booleans for a multi-label task."""
    logits, truth = np.asarray(predictions), np.asarray(labels)
    if spec.label_names is None and logits.ndim == 1:
        logits = logits[:, None]
    shape = (len(truth), spec.num_labels) if truth.ndim else ()
    if logits.shape != shape or truth.shape != (shape if spec.multi_label else shape[:1]) or len(truth) == 0:
        width = f", {spec.num_labels}" if spec.multi_label else ","
        raise TaskError(
            f"{spec.name}: received predictions of shape {logits.shape} and labels of shape {truth.shape}; "
            f"expected (N, {spec.num_labels}) and (N{width}) with N at least 1"
        )
    if spec.label_names is None:
        return logits[:, 0].astype(np.float64), truth
    if spec.multi_label:
        return logits > cuts(thresholds), truth > 0.5  # a NaN is no label
    # argmax would answer with the NaN's own index; class -1 is never right.
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1)), truth


def _f1(
    guess: NDArray[Any], truth: NDArray[Any], average: str = "macro", classes: Sequence[int] | None = (1,)
) -> float:
    metrics = require("sklearn.metrics", "train", "F1")
    return float(metrics.f1_score(truth, guess, labels=classes, average=average, zero_division=0.0))


def _matthews(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    if (guess == guess[0]).all() or (truth == truth[0]).all():  # scikit-learn would warn
        return 0.0
    metrics = require("sklearn.metrics", "train", "Matthews correlation")
    return float(metrics.matthews_corrcoef(truth, guess))


def _correlation(name: str, guess: NDArray[Any], truth: NDArray[Any]) -> float:
    stats = require("scipy.stats", "train", "A correlation")
    if len(truth) < 2 or not (np.isfinite(guess).all() and np.isfinite(truth).all()):
        return 0.0
    constant = (stats.ConstantInputWarning, stats.NearConstantInputWarning)
    with warnings.catch_warnings():
        for category in constant:
            warnings.simplefilter("error", category)
        try:
            return float(getattr(stats, name)(guess, truth.astype(np.float64)).statistic)
        except constant:
            return 0.0


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return np.clip(np.nan_to_num(values, nan=_WORST, posinf=_WORST, neginf=-_WORST), -_WORST, _WORST)


_METRICS: Final[dict[str, Metric]] = {
    "accuracy": lambda guess, truth: float((guess == truth).mean()),
    "f1": _f1,
    "macro_f1": lambda guess, truth: _f1(guess, truth, classes=[c for c in np.union1d(guess, truth) if c >= 0]),
    "matthews_correlation": _matthews,
    "pearson": partial(_correlation, "pearsonr"),
    "spearman": partial(_correlation, "spearmanr"),
    "mae": lambda guess, truth: float(np.abs(_finite(guess) - truth).mean()),
    "rmse": lambda guess, truth: float(np.sqrt(np.square(_finite(guess) - truth).mean())),
}
_MULTI_LABEL: Final[dict[str, Metric]] = {
    "micro_f1": partial(_f1, average="micro", classes=None),
    "macro_f1": partial(_f1, classes=None),
    "subset_accuracy": lambda guess, truth: float((guess == truth).all(axis=1).mean()),
}
