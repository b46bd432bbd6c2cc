"""Refusing a value in one sentence that names the parameter, what it was and what is expected.

Used by configs and by calls alike. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from sparsepeft.errors import UserError, unknown_name


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


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """The value as a float, NumPy's as well.

    Args:
        name, value: of the parameter.
        above: the value must be greater.
        least, most: the value must be in this range.

    Raises:
        UserError: it is no number, not finite, or out of its range.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (
        (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    ):
        return float(value)
    if above is not None:
        wanted = f"above {above:g}"
    else:
        wanted = f"of at least {least:g}" if most is None else f"from {least:g} to {most:g}"
    raise UserError(f"`{name}={value!r}` was given, but it must be a number {wanted}.")


def check_flag(name: str, value: Any) -> None:
    """See that a value is True or False.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, bool):
        raise UserError(f"`{name}={value!r}` was given, but it must be True or False.")


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """See that a value is one of some names.

    Raises:
        UserError: it is not; the sentence has the nearest of them.
    """
    if value not in valid:
        raise UserError(unknown_name(f"`{name}`:", str(value), valid))
