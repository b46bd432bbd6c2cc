"""What is seen of files being answered: a bar, or lines where nobody looks at a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sparsepeft.reprs import duration
from sparsepeft_cli.terminal.console import err, say
from sparsepeft_cli.terminal.interrupts import Stop

_LINE_SECONDS = 30.0  # between two lines


class BulkProgress:
    """Shows the share of the input that is answered, rows, and rows a second; give the library :meth:`show`."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("answering"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=err,
        )
        self._task: Any = None
        self._files = 0
        self._last = time.monotonic()

    def show(self, report: Any, share: float) -> None:
        """A chunk is done: the ``BulkReport`` so far, and the share of it all."""
        self._files = report.files
        text = f"{report.rows:,} rows, {report.rows_per_second:,.0f} a second"
        if err.is_terminal:
            if self._task is None:  # not before, since an error in what was given should stand alone on the screen
                self._task = self._progress.add_task("", total=1.0)
                self._progress.start()
            self._progress.update(self._task, completed=share, description=text)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            left = duration(report.seconds * (1 - share) / share)
            say(f"{time.strftime('%H:%M:%S')}  {share:.1%}  {text}  ETA {left}")

    def __enter__(self) -> BulkProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if isinstance(error, Stop):
            error.left = f"with {self._files:,} files written; the same command goes on from there."
