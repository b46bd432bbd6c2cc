"""Labels that have a column of 0 and 1 each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from sparsepeft.errors import TaskError

_VALUES: Final = {**dict.fromkeys(("0", "0.0", "false"), False), **dict.fromkeys(("1", "1.0", "true"), True)}


def read_indicators(where: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that a row has: the names of the columns with a 1.

    Args:
        where: the row is, for messages.
        values: of those columns by name; true and false are taken for 1 and 0.

    Raises:
        TaskError: one is something else.
    """
    for name, value in values.items():
        if _indicator(value) is None:
            raise TaskError(
                f"{where}: {name} is {value!r:.60}; expected 0 or 1, as in every column of a label, correct the row"
            )
    return tuple(name for name, value in values.items() if _indicator(value))


def indicator_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that hold only 0 and 1, in the order of the first row."""
    names: list[str] | None = None
    for row in rows:
        names = [name for name in (row if names is None else names) if _indicator(row.get(name)) is not None]
        if not names:
            break
    return names or []


def _indicator(value: Any) -> bool | None:
    return _VALUES.get(str(value).strip().lower())
