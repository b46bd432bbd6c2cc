"""Refusing values that a call was given, in one sentence that names the parameter and what it was.

Nothing heavy is imported here.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from sparsepeft.errors import UserError


def check_whole(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The value as an int, NumPy's as well.

    Raises:
        UserError: it is no whole number, or out of its range.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"`{name}={value!r}` was given, but it must be a whole number {expected}.")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        UserError: it is no number, not finite, or not above 0.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise UserError(f"`{name}={value!r}` was given, but it must be a number above 0.")
    return float(value)


def check_flag(name: str, value: Any) -> None:
    """See that a value is True or False.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, bool):
        raise UserError(f"`{name}={value!r}` was given, but it must be True or False.")
