"""Tables at the widths of terminals."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sparsepeft_cli.terminal.console import table

FIGURES = [[f"{row}.{column}e-07" for column in range(6)] for row in range(4)]
ROWS = [[f"task number {row}, [x]", *figures] for row, figures in enumerate(FIGURES)]
COLUMNS = ["task", "texts", "deviation", "other labels", "adapter", "float32", "int8"]


@pytest.mark.parametrize(("width", "kind"), [(120, "wide"), (80, "blocks"), (60, "blocks"), (20, "blocks")])
def test_no_figure_is_cut(width: int, kind: str) -> None:
    printed = _printed(COLUMNS, ROWS, width)
    assert ("┃" in printed) == (kind == "wide")
    for row in ROWS:
        assert all(cell in printed for cell in row[1:])
    assert "…" not in printed
    assert all(cell_len(line) <= max(width, 23) for line in printed.splitlines())


def test_few_rows_become_columns() -> None:
    printed = _printed(COLUMNS, ROWS[:2], 60)
    assert [line for line in printed.splitlines() if "other labels" in line and "0.2e-07" in line and "1.2e-07" in line]
    assert "task number 1, [x]" in printed


def test_a_table_without_rows_has_its_header() -> None:
    assert "deviation" in _printed(COLUMNS, [], 120)


def _printed(columns: list[str], rows: list[list[str]], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table("a title", columns, rows), soft_wrap=True)
    console.print(table("", columns, rows))
    return console.file.getvalue()  # type: ignore[attr-defined]
