"""Metrics from logits: accuracy, F1, Matthews, Pearson and Spearman, never NaN and never a warning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsepeft.tasks.errors import TaskError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sparsepeft.tasks.spec import TaskSpec


def compute(spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score logits; see `TaskSpec.compute_metrics`."""
    logits, truth = np.asarray(predictions), np.asarray(labels)
    if spec.label_names is None and logits.ndim == 1:
        logits = logits[:, None]
    if truth.ndim != 1 or logits.shape != (len(truth), spec.num_labels) or len(truth) == 0:
        raise TaskError(
            f"{spec.name}: received predictions of shape {logits.shape} and labels of shape {truth.shape}; "
            f"expected (N, {spec.num_labels}) and (N,) with N at least 1"
        )
    guess = logits[:, 0].astype(np.float64) if spec.label_names is None else _classes(logits)
    scores = {name: _METRICS[name](guess, truth) for name in spec.metrics}
    if spec.main_metric not in scores:
        scores[spec.main_metric] = sum(scores.values()) / len(scores)
    return scores


def _classes(logits: NDArray[Any]) -> NDArray[Any]:
    # argmax would answer with the NaN's own index; class -1 is never right.
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def _accuracy(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    return float((guess == truth).mean())


def _f1(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    return _class_f1(guess, truth, 1)


def _macro_f1(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    present = [label for label in np.union1d(guess, truth) if label >= 0]
    return float(np.mean([_class_f1(guess, truth, label) for label in present]))


def _class_f1(guess: NDArray[Any], truth: NDArray[Any], label: int) -> float:
    hits = int(((guess == label) & (truth == label)).sum())
    total = int((guess == label).sum() + (truth == label).sum())
    return 2 * hits / total if total else 0.0


def _matthews(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    if _constant(guess) or _constant(truth):
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, guess))


def _pearson(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    truth = truth.astype(np.float64)
    if not (np.isfinite(guess).all() and np.isfinite(truth).all()) or _constant(guess) or _constant(truth):
        return 0.0
    # Scale by the largest deviation first: very large or very small outputs neither overflow nor vanish when squared.
    x, y = (values - values.mean() for values in (guess / np.abs(guess).max(), truth / np.abs(truth).max()))
    x_max, y_max = np.abs(x).max(), np.abs(y).max()
    if x_max < 1e-12 or y_max < 1e-12:  # constant but for rounding
        return 0.0
    x, y = x / x_max, y / y_max
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _spearman(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    if not (np.isfinite(guess).all() and np.isfinite(truth).all()):
        return 0.0
    from scipy.stats import rankdata

    return _pearson(rankdata(guess), rankdata(truth))


def _constant(values: NDArray[Any]) -> bool:
    return bool((values == values[0]).all())


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
