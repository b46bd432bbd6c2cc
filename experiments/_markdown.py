"""Tables of the results page."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
