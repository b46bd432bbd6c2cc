"""Refusing values in configs, in one sentence that names the parameter and what it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sparsepeft.errors import UserError, unknown_name


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
    if not isinstance(config.seed, int) or isinstance(config.seed, bool) or config.seed < 0:
        raise UserError(f"`seed={config.seed}` was given, but it must be a whole number of at least 0.")


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
