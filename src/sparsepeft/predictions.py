"""What a model is asked, and what it says about one input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsepeft.errors import UserError

Text = str | tuple[str, str]
Input = Text | Sequence[str] | Mapping[str, str]
_KEYS = ("text", "text_pair")  # of an input that is a dictionary, as in transformers' pipelines


def read_input(given: Any) -> tuple[str, ...]:
    """The text, or the two texts, of one input.

    Args:
        given: a text, a tuple or list of one or two, or a dictionary with ``text`` and, for a pair, ``text_pair``.

    Raises:
        UserError: it is none of these, or a text is not valid Unicode.
    """
    parts: tuple[Any, ...] = ()
    if isinstance(given, str):
        parts = (given,)
    elif isinstance(given, Mapping) and "text" in given and given.keys() <= set(_KEYS):
        parts = tuple(given[key] for key in _KEYS if given.get(key) is not None)
    elif isinstance(given, (tuple, list)):
        parts = tuple(given)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise UserError(
            f"An input is {given!r:.80} ({type(given).__name__}); expected a text, a pair of texts, or a dictionary "
            "with text and text_pair."
        )
    for part in parts:
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"An input has {part[error.start]!a} at position {error.start}, half of a surrogate pair, which is no "
                "character; decode the text again, or replace it."
            ) from None
    return parts


def listed(items: Iterable[Any]) -> Iterable[Any]:
    """What a call was given for a list: a text or a dictionary is a list of one, as for transformers' pipelines.

    Raises:
        UserError: it is no list.
    """
    if isinstance(items, (str, Mapping)):
        return [items]
    if isinstance(items, bytes) or not isinstance(items, Iterable):
        raise UserError(f"{items!r:.80} ({type(items).__name__}) was given; expected a list of inputs.")
    return items


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input.

    Attributes:
        label: the most probable label; None for regression, and where there is an error.
        score: its probability, or the predicted value; NaN where there is an error.
        scores: probability of every label; empty for regression.
        truncated: whether the input was longer than the task takes and was cut, as in training.
        error: why there is no answer; None where there is one.
        labels: where several may hold, those of a probability above 0.5, in the task's order; else None.
    """

    label: str | None
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    error: str | None = None
    labels: tuple[str, ...] | None = None

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
    several = tuple(label for label, score in scores.items() if score > 0.5) if multi_label else None
    return Prediction(best, scores[best], scores, truncated, labels=several)
