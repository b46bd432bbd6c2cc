"""Labels that have a column of 0 and 1 each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from sparsepeft.errors import TaskError
from sparsepeft.rows.reading import Row

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


class Indicators(NamedTuple):
    """Columns of 0 and 1.

    Attributes:
        names: of those that hold nothing else.
        others: of those that mostly do, the line of the first cell that holds something else, and what that is.
    """

    names: tuple[str, ...] = ()
    others: Mapping[str, tuple[int, Any]] = MappingProxyType({})


def indicator_columns(rows: Iterable[Row]) -> Indicators:
    """Find them, in the order of the first row."""
    held: Counter[str] = Counter()
    others: dict[str, tuple[int, Any]] = {}
    names: dict[str, None] = {}  # ordered, each once
    count = 0
    for row in rows:
        count += 1
        for name in names if names else row.values:
            value = row.values.get(name)
            if _indicator(value) is None:
                others.setdefault(name, (row.line, value))
            else:
                held[name] += 1
        names = names or dict.fromkeys(row.values)
    mostly = [name for name in names if 2 * held[name] > count]
    return Indicators(
        tuple(name for name in mostly if name not in others),
        {name: others[name] for name in mostly if name in others},
    )


def _indicator(value: Any) -> bool | None:
    return _VALUES.get(str(value).strip().lower())
