"""What is seen of a matrix of runs: one bar, or lines without a terminal, and a line for each run that ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from sparsepeft.training.callbacks import StopAfterStep, Watcher
from sparsepeft_cli.terminal.console import err, say
from sparsepeft_cli.terminal.errors import in_options
from sparsepeft_cli.terminal.interrupts import Stop, handling, stop_after_step

_LINE_SECONDS = 60.0  # between two lines on the same run


class MatrixProgress(Watcher):
    """Shows how many runs are done and what the current one does.

    Ctrl-C and SIGTERM have that run write a checkpoint before it ends.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=err,
        )
        self._stack = contextlib.ExitStack()
        self._task: Any = None
        self._ended = self._total = 0
        self._last = 0.0

    def __enter__(self) -> MatrixProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if err.is_terminal:
            self._progress.stop()
        self._stack.close()
        if isinstance(error, KeyboardInterrupt) and self._total:
            stop = error if isinstance(error, Stop) else Stop()  # Ray makes Python's own of it
            stop.left = f"with {self._ended} of {self._total} runs done; the same command goes on from there."
            if stop is not error:
                raise stop from error

    def begins(self, num_runs: int) -> None:
        """Show the bar; not before, since an error in what was given should stand alone on the screen."""
        self._total = num_runs
        self._task = self._progress.add_task("", total=num_runs)
        if err.is_terminal:
            self._progress.start()

    def callbacks(self, run: str) -> Sequence[TrainerCallback]:
        """Callbacks that show the run's step."""
        show, stopper = self._show, StopAfterStep()
        show(run, now=True)

        class _Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                show(f"{run} step {state.global_step}/{state.max_steps}")

        self._stack.enter_context(handling(stop_after_step(stopper)))
        return [_Callback(), stopper]

    def finished(self, run: str, result: dict[str, Any], here: bool) -> None:
        """Count the run; a line if it was done here."""
        self._count()
        if here:
            say(
                f"{self._counted}  {run:<28} {result['main_metric']} {result['score']:.4f} on "
                f"{result['score_split']}, {result['train_seconds']:.0f} s"
            )

    def failed(self, run: str, error: dict[str, Any]) -> None:
        """Count the run and say what ended it."""
        self._count()
        say(f"{self._counted}  {run:<28} FAILED: {error['type']}: {in_options(error['message'])}")

    def scored(self, run: str, step: int, max_steps: int, score: float) -> None:
        """Show how far a run has come elsewhere."""
        self._show(f"{run} step {step}/{max_steps} score {score:.4f}")

    def stopped(self, run: str, step: int, max_steps: int, score: float, here: bool) -> None:
        """Count the run; a line if it was stopped now."""
        self._count()
        if here:
            say(f"{self._counted}  {run:<28} stopped at step {step} of {max_steps}, score {score:.4f}")

    def waiting(self, runs: Sequence[str]) -> None:
        """Say who is waited for."""
        self._show(f"waiting for {len(runs)} in another process", now=True)

    def measuring(self, what: str) -> None:
        """Say what is measured."""
        self._progress.update(self._task, description=what)
        if not err.is_terminal:
            say(f"{time.strftime('%H:%M:%S')}  {what}")

    @property
    def _counted(self) -> str:
        return f"{self._ended:>{len(str(self._total))}}/{self._total}"

    def _count(self) -> None:
        self._stack.close()  # no step is being done
        self._ended += 1
        self._progress.update(self._task, completed=self._ended, description="")

    def _show(self, text: str, now: bool = False) -> None:
        self._progress.update(self._task, description=text)
        if not err.is_terminal and (now or time.monotonic() - self._last >= _LINE_SECONDS):
            self._last = time.monotonic()
            say(f"{time.strftime('%H:%M:%S')}  run {self._ended + 1} of {self._total}: {text}")
