"""Reading the values of a config that may be given in several forms: as people write them, and as a file keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sparsepeft.errors import UserError

BALANCED = "balanced"  # of class_weights
SELECTION = "selection"  # of thresholds
_WEIGHTS_FORM = f"expected `class_weights={BALANCED}`, or a positive number for each label, such as spam=3,ham=1"


def read_trackers(values: Any) -> tuple[str, ...]:
    """Names of trackers: from ``"a,b"``, a list of such, ``"none"`` or None.

    Raises:
        UserError: it is something else.
    """
    parts = [values] if isinstance(values, str) else values or ()
    if not isinstance(parts, Iterable) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"`report_to={values!r}` was given; expected names such as tensorboard, or none.")
    names = dict.fromkeys(name.strip() for part in parts for name in part.split(","))
    return tuple(name for name in names if name not in ("", "none"))


def read_class_weights(value: Any) -> str | dict[str, float] | None:
    """Class weights as a config keeps them: ``"balanced"``, or a weight by label.

    Args:
        value: these, or a string such as ``"spam=3,ham=1"``; None for none.

    Raises:
        UserError: it is something else.
    """
    if value is None or value == BALANCED:
        return value
    pairs: list[Any] = []
    if isinstance(value, str):
        pairs = [part.rpartition("=")[::2] for part in value.split(",")]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    weights = {}
    for label, weight in pairs:
        try:
            weights[_label(label)] = float(weight)
        except (TypeError, ValueError):
            weights[_label(label)] = math.nan
    is_valid = all(label and 0 < weight < math.inf for label, weight in weights.items())
    if not weights or not is_valid or len(weights) < len(pairs):
        raise UserError(f"`class_weights={value}` was given; {_WEIGHTS_FORM}.")
    return weights


def _label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()  # YAML's true, as JSON writes it


def read_thresholds(value: Any) -> str | float:
    """Thresholds as a config keeps them: ``"selection"``, or a probability for all labels.

    Args:
        value: these, or the probability as a string.

    Raises:
        UserError: it is something else.
    """
    if value == SELECTION:
        return SELECTION
    try:
        threshold = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        threshold = math.nan
    if not 0 < threshold < 1:
        raise UserError(
            f"`thresholds={value}` was given; expected `thresholds={SELECTION}`, or a probability between 0 and 1 for "
            "all labels, such as 0.5."
        )
    return threshold


def read_columns(value: Any) -> str | tuple[str, ...] | None:
    """Names of columns as a config keeps them: a text as it is, a list of names as a tuple; None for none.

    Raises:
        UserError: it is something else.
    """
    if value is None or isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"`label_column={value}` was given; expected the name of a column, or a list of names.")
    return names
