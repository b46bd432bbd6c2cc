"""A progress bar for a training run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsepeft_cli._console import err


class TrainingProgress:
    """Shows step, loss and score while ``transformers.Trainer`` runs; give it ``callback``."""

    def __init__(self, label: str = "training") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=err,
            transient=False,
        )
        self._label = label
        self._values: dict[str, float] = {}
        self._task: Any = None

    def labelled(self, label: str) -> TrainingProgress:
        """The same display, with another name for the bars that start from now on."""
        self._label = label
        self._values = {}
        return self

    @property
    def callback(self) -> Any:
        """A ``TrainerCallback`` that moves the bar. Made late, because transformers is slow to import."""
        from transformers import TrainerCallback

        progress = self

        class _Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress._start(state.max_steps, state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress._move(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
                progress._note(logs or {})

        return _Callback()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def _start(self, total: int, done: int) -> None:
        self._progress.start()  # not before: an error in the settings should stand alone on the screen
        self._task = self._progress.add_task(self._label, total=total, completed=done, shown="")

    def _move(self, step: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def _note(self, logs: dict[str, Any]) -> None:
        for key, name in (("loss", "loss"), ("eval_score", "score")):
            if key in logs:
                self._values[name] = float(logs[key])
        if self._task is not None:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self._values.items())
            self._progress.update(self._task, shown=shown)
