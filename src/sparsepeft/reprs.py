"""Short representations for consoles and logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def changed_fields(instance: Any, leave_out: Collection[str] = ()) -> str:
    """A dataclass's name with the fields that differ from their defaults, such as ``SptConfig(top_l=4)``."""
    shown = []
    for field in dataclasses.fields(instance):
        if not field.repr or field.name in leave_out:
            continue
        value = getattr(instance, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is dataclasses.MISSING or type(value) is not type(default) or value != default:
            shown.append(f"{field.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(shown)})"


def first_of(names: Collection[str], limit: int = 5) -> str:
    """Names in a row, of many only the first."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def megabytes(size: float) -> str:
    """Bytes for people: decimal units, as the storage industry and the paper use."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def millions(count: int) -> str:
    """Parameters for people; small counts exactly."""
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def duration(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
