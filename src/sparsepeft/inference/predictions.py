"""What a model is asked, and what it says about one input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from sparsepeft.errors import UserError

Text = str | tuple[str, str]
OnError = Literal["return", "raise"]
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
            if "\udc80" <= part[error.start] <= "\udcff":  # as Python's "surrogateescape" has them
                raise UserError(
                    f"An input has a byte at position {error.start} that is not UTF-8; read it in its own encoding."
                ) from None
            raise UserError(
                f"An input has {part[error.start]!a} at position {error.start}, half of a surrogate pair, which is no "
                "character; decode the text again, or replace it."
            ) from None
    return parts


def texts_of(given: Any, num_texts: int | None, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """The text, or the two texts, of an input of a task.

    Args:
        given: as for :func:`read_input`.
        num_texts: of an input of the task; None takes one or two.
        may_be_empty: take empty texts, too, as data sets have some.

    Raises:
        UserError: it is no input, has an empty text, or another number of texts than the task takes.
    """
    texts = read_input(given)
    if num_texts not in (None, len(texts)):
        raise UserError(f"The task takes {num_texts} text(s) per input, but {len(texts)} came; pass as many.")
    if not may_be_empty and not all(part.strip() for part in texts):
        raise UserError("An input has an empty text; pass some words.")
    return texts


def check_on_error(value: Any) -> None:
    """See that ``on_error`` is one of its values.

    Raises:
        UserError: it is not.
    """
    if value not in get_args(OnError):
        raise UserError(f"`on_error={value!r}` was given; pass {' or '.join(map(repr, get_args(OnError)))}.")


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

    Returns:
        One with an error where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return Prediction.failed("The model's output for this input is not a finite number; train it again.")
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
