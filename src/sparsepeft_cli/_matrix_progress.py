"""One progress bar for a matrix of runs, and a line for each run that ends."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparsepeft.reproduction import Run, Watcher
from sparsepeft_cli._console import err


class MatrixProgress(Watcher):
    """Shows how many runs are done and what the current one does."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=err,
        )
        self._task: Any = None
        self._ended = 0

    def __enter__(self) -> MatrixProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begins(self, num_runs: int) -> None:
        """Show the bar; not before, since an error in what was given should stand alone on the screen."""
        self._task = self._progress.add_task("", total=num_runs)
        self._progress.start()

    def callbacks(self, run: Run) -> Sequence[Any]:
        """A callback that shows the run's step. Made late, because transformers is slow to import."""
        from transformers import TrainerCallback

        show = self._show
        show(run.name)

        class _Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                show(f"{run.name} step {state.global_step}/{state.max_steps}")

        return [_Callback()]

    def finished(self, run: Run, result: dict[str, Any], here: bool) -> None:
        """Count the run; a line if it was done here."""
        self._count()
        if here:
            self._say(
                f"{run.name:<28} {result['main_metric']} {result['score']:.4f} on {result['score_split']}, "
                f"{result['train_seconds']:.0f} s"
            )

    def failed(self, run: Run, error: dict[str, Any]) -> None:
        """Count the run and say what ended it."""
        self._count()
        self._say(f"{run.name:<28} FAILED: {error['type']}: {error['message']}")

    def waiting(self, runs: Sequence[Run]) -> None:
        """Say who is waited for."""
        self._show(f"waiting for {len(runs)} in another process")

    def _count(self) -> None:
        self._ended += 1
        self._progress.update(self._task, completed=self._ended, description="")

    def _show(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def _say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
