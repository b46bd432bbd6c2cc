"""The probability from which on a label holds, where several may: chosen on rows that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

HALF: Final = 0.5  # where nothing was chosen
# Rows that have a label; with fewer, a threshold of its own fits these rows rather than others. On GoEmotions (a linear
# head on MiniLM, 500 to 2,000 rows to choose on) 50 gave more micro F1 and no less macro F1 on the test part than 1, 5,
# 10 and 20 did.
LEAST_POSITIVES: Final = 50


def choose_thresholds(
    logits: ArrayLike, labels: ArrayLike, least_positives: int = LEAST_POSITIVES
) -> tuple[float, ...]:
    """Choose for each label the probability above which it holds, so that its F1 on these rows is greatest.

    Rare labels share one, with which the micro F1 of all of these labels together is greatest; it is 0.5 where no row
    has any of them.

    Args:
        logits: (N, C).
        labels: ones and zeros, (N, C).
        least_positives: labels that fewer rows have are rare.

    Returns:
        A probability for each label, halfway between two that occur.
    """
    probabilities, truth = _probabilities(np.asarray(logits, dtype=np.float64)), np.asarray(labels) > 0.5
    is_rare = truth.sum(axis=0) < least_positives
    shared = _best(probabilities[:, is_rare].ravel(), truth[:, is_rare].ravel())
    pairs = zip(is_rare, probabilities.T, truth.T, strict=True)
    return tuple(shared if rare else _best(*column) for rare, *column in pairs)


def cuts(thresholds: Sequence[float] | None) -> NDArray[np.float64]:
    """The logits of probabilities, (C,); without any, that of one half, ()."""
    if thresholds is None:
        return np.zeros(())
    probabilities = np.asarray(thresholds, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.log(probabilities) - np.log1p(-probabilities)


def _best(probabilities: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The threshold with the greatest F1 for one label, (N,); of equal ones the highest."""
    if not truth.any():
        return HALF
    order = np.argsort(-probabilities, kind="stable")
    ordered = np.append(probabilities[order], 0.0)
    f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(order) + 1) + truth.sum())
    f1[ordered[:-1] == ordered[1:]] = 0.0  # equal probabilities cannot be told apart
    last = int(f1.argmax())
    return float(ordered[last] + ordered[last + 1]) / 2


def _probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a NaN it is 0, with which no label holds."""
    clipped = np.clip(np.nan_to_num(logits, nan=-np.inf), -700, 700)  # beyond, exp overflows
    return 1 / (1 + np.exp(-clipped))
