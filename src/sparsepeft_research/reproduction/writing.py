"""A table's files beside its results."""

from __future__ import annotations

import logging
from pathlib import Path

from sparsepeft.errors import UserError
from sparsepeft.folders import write_bytes
from sparsepeft_research.reproduction.figure import write_figure
from sparsepeft_research.reproduction.render import to_csv, to_markdown
from sparsepeft_research.reproduction.tables import Table

logger = logging.getLogger(__name__)


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write ``table2.md``, ``table2.csv``, ``table2.png`` and ``table2.svg``; without matplotlib, the first two.

    Returns:
        The files written.
    """
    written = []
    for suffix, text in ((".md", to_markdown(table)), (".csv", to_csv(table))):
        path = folder / f"{table.name}{suffix}"
        write_bytes(path, text.encode())
        written.append(path)
    try:
        written += write_figure(table, folder / table.name)
    except UserError as error:
        logger.warning("%s", error)
    return written
