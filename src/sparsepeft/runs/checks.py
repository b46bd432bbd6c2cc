"""Refusing values in configs, in one sentence that names the parameter and what it was."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sparsepeft.errors import UserError, unknown_name

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def plain_fields(config: Any) -> dict[str, Any]:
    """A config's values as plain Python has them: paths as texts, NumPy's numbers as numbers.

    Fields that may hold lists, or texts as well as mappings, are left to what reads them.

    Raises:
        UserError: a value is of none of its field's types.
    """
    values = {}
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
        elif isinstance(value, numbers.Integral) and not isinstance(value, bool) and kinds & {int, float}:
            value = int(value)
        elif isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) and kinds & {int, float}:
            value = float(value)  # whether it is whole is looked at by check_values
        words = [word for kind, word in _WORDS.items() if kind in kinds]
        allowed = tuple(kinds | ({int, float} if kinds & {int, float} else set()))
        is_read_elsewhere = bool(kinds & {list, tuple, Any}) or kinds >= {str, dict}
        if not is_read_elsewhere and (not isinstance(value, allowed) or (value is True and bool not in kinds)):
            raise UserError(f"`{name}={value}` was given, but it must be {' or '.join(words)}.")
        values[name] = value
    return values


def check_values(
    config: Any, choices: Mapping[str, Iterable[str]], positive: Iterable[str], whole: Iterable[str] = ()
) -> None:
    """Refuse a config whose named fields are not among their choices, not positive, not whole, no flags, or no seed.

    Raises:
        UserError: naming the field and its value.
    """
    for name, valid in choices.items():
        check_choice(name, getattr(config, name), valid)
    for name in (*positive, *whole):
        if (value := getattr(config, name)) is not None:
            check_number(name, value, above=0)
            if name in whole and not isinstance(value, int):
                raise UserError(f"`{name}={value}` was given, but it must be a whole number.")
    for flag in dataclasses.fields(config):
        value = getattr(config, flag.name)
        if isinstance(flag.default, bool) and not isinstance(value, bool):
            raise UserError(f"`{flag.name}={value}` was given, but it must be true or false.")
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise UserError(f"`seed={config.seed}` was given, but it must be a whole number from 0 to {2**32 - 1}.")


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse what is not among some names, and name the nearest."""
    if value not in valid:
        raise UserError(unknown_name(f"`{name}`:", str(value), valid))


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    """Refuse what is no finite number, or out of its range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (
        (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    ):
        return
    if above == 0:
        wanted = "a positive number"
    elif most is None:
        wanted = f"a number of at least {least:g}"
    else:
        wanted = f"a number from {least:g} to {most:g}"
    raise UserError(f"`{name}={value}` was given, but it must be {wanted}.")
