"""What a model says about one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input.

    Attributes:
        label: the most probable label; None for regression, and where there is an error.
        score: its probability, or the predicted value; NaN where there is an error.
        scores: probability of every label; empty for regression.
        truncated: whether the input was longer than the task takes and was cut, as in training.
        error: why there is no answer; None where there is one.
    """

    label: str | None
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> Prediction:
        """The place of an answer that could not be given."""
        return cls(None, float("nan"), error=error)


def prediction(
    logits: np.ndarray, label_names: Sequence[str] | None, *, multi_label: bool = False, truncated: bool = False
) -> Prediction:
    """The prediction that logits stand for.

    Args:
        logits: (num_labels,).
        label_names: one for each; None for regression.
        multi_label: labels do not exclude each other, so that each has a probability of its own.
        truncated: see :class:`Prediction`.
    """
    if label_names is None:
        return Prediction(None, float(logits[0]), truncated=truncated)
    if multi_label:
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    else:
        shifted = np.exp(logits - logits.max())
        probabilities = shifted / shifted.sum()
    scores = dict(zip(label_names, probabilities.tolist(), strict=True))
    best = max(scores, key=lambda label: scores[label])
    return Prediction(best, scores[best], scores, truncated)
