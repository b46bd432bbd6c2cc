"""What watches runs while they train: what each is about to do, its history, trackers, and what ends it early."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from sparsepeft.backbones import describe_backbone
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.folders import write_bytes
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.history import read_lines
from sparsepeft.training.data import RunData
from sparsepeft.training.processes import any_of_all

_NOT_KEPT = ("runtime", "_per_second", "flos", "train_loss", "epoch")  # ends of names: timings, and sums over a run


@dataclass(frozen=True)
class RunPlan:
    """What is known when the first step begins.

    Attributes:
        task, method: of the run.
        model: the backbone's name.
        device: where it is trained, as PyTorch names it.
        precision: of the computation.
        sizes: rows, or blocks of text, by part; the first part is trained on.
        steps: of the whole run.
        steps_done: by the checkpoint that the run goes on from; 0 for a new one.
        epochs: passes over the training part.
        batch_size: examples of a step.
        notes: on the data.
        folder: of the output.
    """

    task: str
    method: str
    model: str
    device: str
    precision: str
    sizes: Mapping[str, int]
    steps: int
    steps_done: int
    epochs: float
    batch_size: int
    notes: tuple[str, ...]
    folder: Path


class Announcer(TrainerCallback):
    """Tells what a run is about to do when it begins.

    Args:
        announce: is told.
    """

    def __init__(self, announce: Callable[[RunPlan], None], config: RunConfig, data: RunData) -> None:
        self._announce, self._config, self._data = announce, config, data

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        if not state.is_world_process_zero:
            return
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        plan = RunPlan(
            task=self._config.task,
            method=self._config.method,
            model=describe_backbone(self._data.model),
            device=str(args.device),
            precision=self._config.precision,
            sizes=self._data.sizes,
            steps=state.max_steps,
            steps_done=state.global_step,
            epochs=state.max_steps / -(-len(self._data.train) // batch_size),
            batch_size=batch_size,
            notes=self._data.notes,
            folder=Path(self._config.output_dir),
        )
        self._announce(plan)


class Recorder(TrainerCallback):
    """Appends each of the trainer's logs to a file, one JSON object a line.

    A line has ``step``, ``epoch`` and ``seconds`` (since the start, pauses left out), and by the trainer's names what
    was logged: ``loss``, ``learning_rate`` and ``grad_norm``, or ``eval_loss`` and the metrics. A resumed run drops
    the lines after its checkpoint and goes on.

    Args:
        path: of the file, whose folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what belongs to the steps that are done."""
        if not state.is_world_process_zero:
            return
        done = state.global_step
        kept = [line for line in read_lines(self._path) if line["step"] <= done] if done else []
        write_bytes(self._path, "".join(map(_line, kept)).encode())
        self._start = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line."""
        values = {key: _finite(value) for key, value in (logs or {}).items() if not key.endswith(_NOT_KEPT)}
        if not values or not state.is_world_process_zero:
            return
        seconds = round(time.monotonic() - self._start, 1)
        epoch = None if state.epoch is None else round(state.epoch, 4)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, "epoch": epoch, "seconds": seconds, **values}))


class StopAfterStep(TrainerCallback):
    """Ends a run, when asked to, with a checkpoint after the step it is at.

    Example:
        >>> import signal
        >>> from sparsepeft.training import RunConfig, train
        >>> stop = StopAfterStep()
        >>> former = signal.signal(signal.SIGTERM, lambda *_: stop.ask(SystemExit(143)))
        >>> results = train(RunConfig("topics", "out/stoppable"), callbacks=[stop])
        >>> former = signal.signal(signal.SIGTERM, former)
    """

    def __init__(self) -> None:
        self._is_training = False
        self._error: BaseException | None = None

    def ask(self, error: BaseException) -> bool:
        """Have the run end with ``error`` once the checkpoint is there.

        Returns:
            Whether it will; not where no step is being done, nor when it was asked before.
        """
        if not self._is_training or self._error is not None:
            return False
        self._error = error
        return True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on there are steps."""
        self._is_training, self._error = True, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have a checkpoint written, by all processes once one of them was asked."""
        if any_of_all(self._error is not None):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End here, all processes once the first one has written the checkpoint."""
        if any_of_all(self._error is not None):
            raise self._error or SystemExit(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No more steps."""
        self._is_training = False


class Watcher:
    """Told what happens to several runs, by their names; does nothing by itself."""

    def begins(self, num_runs: int) -> None:
        """So many runs will be looked at."""

    def callbacks(self, run: str) -> Sequence[TrainerCallback]:
        """Callbacks for a run that starts now."""
        return ()

    def finished(self, run: str, result: dict[str, Any], here: bool) -> None:
        """A run has a result; ``here`` unless it was there already or another process made it."""

    def failed(self, run: str, error: dict[str, Any]) -> None:
        """A run failed; ``error`` has the ``type`` and the ``message`` of what ended it."""

    def scored(self, run: str, step: int, max_steps: int, score: float) -> None:
        """A run in another process has scored its selection part; ``score`` is the best so far."""

    def stopped(self, run: str, step: int, max_steps: int, score: float, here: bool) -> None:
        """A run was stopped early, as others are ahead; ``here`` unless that was before."""

    def waiting(self, runs: Sequence[str]) -> None:
        """Only runs that other processes are doing are left."""

    def measuring(self, what: str) -> None:
        """All runs have ended, and this is measured on what they left."""


def make_reporters(trackers: Iterable[str], logs: Path) -> list[TrainerCallback]:
    """A callback for each tracker.

    Args:
        trackers: by transformers' names; ``"all"`` stands for those that are installed.
        logs: folder for TensorBoard's files; other trackers have places of their own.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    reporters = []
    for name in installed if "all" in trackers else trackers:
        if name not in known:
            raise UserError(unknown_name("`report_to`", name, [*known, "all", "none"]))
        try:
            reporter = known[name]()
        except (ImportError, RuntimeError, ValueError) as error:
            lack = str(error).partition(". ")[0]
            raise UserError(
                f"`report_to={name}` was given, but {lack}; install it, or leave `report_to` out."
            ) from error
        if isinstance(reporter, integration_utils.TensorBoardCallback):
            reporter.logging_dir = str(logs)
        reporters.append(reporter)
    return reporters


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value; None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
