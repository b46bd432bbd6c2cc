"""What commands print with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.status import Status
from rich.table import Table
from rich.text import Text


class _Messages(Console):
    """A console whose status is a line for each step where nobody looks at a terminal."""

    def status(self, status: Any, **options: Any) -> Any:
        return _Shown(Text(status), console=self, **options) if self.is_terminal else _Told(status)


class _Shown(Status):
    """A status on a terminal, whose words are taken as they are."""

    def update(self, status: Any = None, **options: Any) -> None:
        super().update(Text(status) if isinstance(status, str) else status, **options)


class _Told:
    """A status without a terminal."""

    def __init__(self, status: str) -> None:
        self._status = status

    def __enter__(self) -> _Told:
        say(self._status)
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, status: str) -> None:
        """Say what is done now."""
        say(status)


# Square brackets in names, paths and texts are no markup.
out = Console(markup=False)
err = _Messages(stderr=True, markup=False)


def say(line: str) -> None:
    """A line on standard error, as it is."""
    err.print(line, highlight=False, soft_wrap=True)


def kept_from_stdout() -> AbstractContextManager[Any]:
    """What libraries print while this lasts, as Ray does where a worker ends, goes to standard error."""
    return redirect_stdout(sys.stderr)


_UNLIMITED = 10_000


def program() -> str:
    """How the reader can start this program: its name, or its path where that is not on the search path."""
    if sys.argv[0].endswith("__main__.py"):
        return "python -m sparsepeft_cli"
    return "sparsepeft" if shutil.which("sparsepeft") or "sparsepeft" not in sys.argv[0] else sys.argv[0]


def print_json(content: Any) -> None:
    """JSON for other programs, on standard output."""
    print(json.dumps(content, ensure_ascii=False))


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Figures:
    """A table whose first column is text and whose others are figures; see :class:`Figures`."""
    return Figures(title, tuple(columns), [[str(cell) for cell in row] for row in rows])


class Figures:
    """A table that never cuts a figure: where it is too wide for the terminal, its rows become columns, or blocks.

    Args:
        title: stands above it; may be empty.
        columns: their names, C of them; the first is that of the rows' names.
        rows: the cells, C in each.
    """

    def __init__(self, title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
        self.title, self.columns, self.rows = title, columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines for a console, the widest form that fits."""
        if self.title:
            yield Text(self.title, style="italic")
        header, *turned = zip(self.columns, *self.rows, strict=True)
        forms = [_grid(self.columns, self.rows), *([_grid(header, turned)] if self.rows else [])]
        for form in forms:
            if Measurement.get(console, options.update(width=_UNLIMITED), form).maximum <= options.max_width:
                yield form
                return
        width = max(map(cell_len, self.columns))
        for name, *cells in self.rows:
            yield Text(name or self.columns[0], style="bold")
            for column, cell in zip(self.columns[1:], cells, strict=True):
                if cell:
                    yield Text(f"  {column}{' ' * (width - cell_len(column))}  {cell}")


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    made = Table(header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
    return made
