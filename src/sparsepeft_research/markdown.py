"""Numbers and tables as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraphs(*parts: str) -> str:
    """Those parts that are not empty, with an empty line between."""
    return "\n\n".join(part for part in parts if part)


def ratio(value: float | None, digits: int = 2) -> str:
    """A ratio, or nothing for the baseline itself."""
    return "" if value is None else f"{value:.{digits}f}"


def spread(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """Mean, and standard deviation of the sample where there is one."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
