"""What is seen of a training run: a banner, then a bar, or lines where nobody looks at a terminal."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsepeft.launch import is_first
from sparsepeft.reprs import duration
from sparsepeft_cli.terminal.console import err, say
from sparsepeft_cli.terminal.errors import in_options
from sparsepeft_cli.terminal.interrupts import Stop, handling, stop_after_step

_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "eval_loss": "eval loss {:.4f}",
    "eval_score": "score {:.4f}",
}
_LINE_SECONDS = 10.0  # between two lines that bring nothing but a loss


class TrainingProgress:
    """Shows a run of ``transformers.Trainer``; give the library ``callbacks`` and ``announce``.

    Ctrl-C and SIGTERM then have the run write a checkpoint before it ends, and what is left is said.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._display = (Bar() if err.is_terminal else Lines()) if is_first() else Silent()
        self._stack = contextlib.ExitStack()
        self._state: Any = None
        self._checkpoint = 0

    def labelled(self, label: str) -> TrainingProgress:
        """The same display, with another name for the runs that start from now on."""
        self._label = label
        return self

    @property
    def callbacks(self) -> list[Any]:
        """Callbacks for the trainer. Made late, because transformers is slow to import."""
        from transformers import TrainerCallback

        from sparsepeft.training.callbacks import StopAfterStep

        progress, stopper = self, StopAfterStep()

        class Watcher(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress._state, progress._checkpoint = state, state.global_step
                progress._display.begin(progress._label, state.global_step, state.max_steps)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress._display.move(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
                progress._display.note(state.global_step, logs or {}, is_last=not control.should_evaluate)

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress._checkpoint = state.global_step

        self._stack.enter_context(handling(stop_after_step(stopper)))
        return [Watcher(), stopper]  # the stopper last: it may end the run

    def announce(self, plan: Any) -> None:
        """Print what a run (a ``RunPlan``) is about to do."""
        for line in banner(plan):
            say(line)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.end()
        self._stack.close()
        if isinstance(error, Stop):
            error.left = self._left()

    def _left(self) -> str:
        if self._state is None:
            return "before training began; the same command starts it again."
        at = f"at step {self._state.global_step:,} of {self._state.max_steps:,}"
        if not self._checkpoint:
            return f"{at}, before the first checkpoint; the same command starts anew."
        return f"{at}; the checkpoint of step {self._checkpoint:,} is kept, and the same command goes on from there."


class Silent:
    """Nothing: of several processes that train together, the first one shows what all of them do."""

    def begin(self, label: str, done: int, total: int) -> None:
        """A run begins."""

    def move(self, step: int) -> None:
        """A step was done."""

    def note(self, step: int, logs: dict[str, Any], is_last: bool) -> None:
        """The trainer has logged something."""

    def end(self) -> None:
        """No more is to come."""


class Bar:
    """A bar with loss and score on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeRemainingColumn(),
            console=err,
            transient=False,
        )
        self._values: dict[str, float] = {}
        self._task: Any = None

    def begin(self, label: str, done: int, total: int) -> None:
        """Show a bar; not before, since an error in the settings should stand alone on the screen."""
        self._values = {}
        self._progress.start()
        self._task = self._progress.add_task(label or "training", total=total, completed=done, shown="")

    def move(self, step: int) -> None:
        """A step was done."""
        self._progress.update(self._task, completed=step)

    def note(self, step: int, logs: dict[str, Any], is_last: bool) -> None:
        """The trainer has logged something."""
        self._values |= {key: logs[key] for key in ("loss", "eval_score") if key in logs}
        self._progress.update(self._task, shown=shown(self._values))

    def end(self) -> None:
        """No more is to come."""
        self._progress.stop()


class Lines:
    """Lines for a file: at each evaluation, at the first and the last step, and every ten seconds."""

    def __init__(self) -> None:
        self._label, self._total, self._printed = "", 0, 0
        self._values: dict[str, float] = {}
        self._start, self._first, self._last = 0.0, 0, 0.0

    def begin(self, label: str, done: int, total: int) -> None:
        """A run begins."""
        self._label, self._total, self._first, self._values = label, total, done, {}
        self._start = self._last = time.monotonic()

    def move(self, step: int) -> None:
        """A step was done."""
        if time.monotonic() - self._last >= 3 * _LINE_SECONDS:  # nothing was logged meanwhile
            self._print(step)

    def note(self, step: int, logs: dict[str, Any], is_last: bool) -> None:
        """The trainer has logged something; unless ``is_last``, an evaluation of this step follows."""
        self._values |= {key: logs[key] for key in _SHOWN if key in logs}
        is_due = step == self._first + 1 or time.monotonic() - self._last >= _LINE_SECONDS
        is_end = "train_runtime" in logs and self._printed < step
        if "eval_score" in logs or is_end or ("loss" in logs and is_last and is_due):
            self._print(step)

    def end(self) -> None:
        """No more is to come."""

    def _print(self, step: int) -> None:
        self._printed, self._last = step, time.monotonic()
        rate = (step - self._first) / max(self._last - self._start, 1e-9)
        left = duration((self._total - step) / rate) if rate else "unknown"
        at = f"step {step:>{len(str(self._total))}}/{self._total}"
        parts = [time.strftime("%H:%M:%S"), self._label, at, shown(self._values), f"{rate:.2f} steps/s", f"ETA {left}"]
        say("  ".join(part for part in parts if part))


def banner(plan: Any) -> list[str]:
    """What a run (a ``RunPlan``) is about to do, in lines."""
    parts = ", ".join(f"{name} {size:,}" for name, size in plan.sizes.items())
    resumed = f"; going on from step {plan.steps_done:,}" if plan.steps_done else ""
    return [
        f"{plan.task}: {plan.method} on {plan.model}, {plan.device}, {plan.precision}",
        f"{'blocks' if plan.task == 'lm' else 'rows'}: {parts}",
        f"{plan.steps:,} steps of {plan.batch_size}, {plan.epochs:.3g} epochs{resumed}",
        *(f"note: {in_options(note)}" for note in plan.notes),
        f"output: {plan.folder}",
    ]


def shown(values: dict[str, float]) -> str:
    """Logged values for people."""
    return "  ".join(form.format(values[key]) for key, form in _SHOWN.items() if key in values)
