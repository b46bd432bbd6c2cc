"""What a sweep leaves beside the folders of its trials, and how each trial stands by its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepeft.errors import Diverged
from sparsepeft.folders import settle, write_json
from sparsepeft.runs.files import describe_run, read_results
from sparsepeft.runs.folder import is_finished
from sparsepeft.runs.history import read_history
from sparsepeft.sweeps.space import Trial

SWEEP = "sweep.json"
_DECIDING = ("config", "data_fingerprints")
DONE, STOPPED, FAILED, DIVERGED, LEFT = "done", "stopped", "failed", "diverged", "left"


@dataclass(frozen=True)
class Standing:
    """How a trial stands.

    Attributes:
        trial: the trial.
        state: ``done``; ``stopped`` early; ``diverged``, its loss was not finite; ``failed``; or ``left`` to be run.
        score: the task's main metric on the selection part: of the finished run, or the best until it was stopped.
        metric: its name, once the run is finished.
        seconds: of training.
        steps, max_steps: that were done, and that there would be.
        error: what ended a trial that diverged or failed.
    """

    trial: Trial
    state: str
    score: float | None = None
    metric: str | None = None
    seconds: float | None = None
    steps: int | None = None
    max_steps: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, with the trial's name, group and values instead of its config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trial"}
        trial = self.trial
        return {"name": trial.name, "task": trial.group, "values": trial.values, **values}


def standing_of(trial: Trial, overwrite: bool = False) -> Standing:
    """How a trial stands by its files.

    Raises:
        UserError: its folder holds a finished run with other values or data, and ``overwrite`` is not set.
    """
    folder = Path(trial.config.output_dir)
    settle(folder)
    if is_finished(folder, described(trial), overwrite):
        results = read_results(folder)
        return Standing(
            trial,
            DONE,
            results["score"],
            results["main_metric"],
            results["train_seconds"],
            results["steps"],
            results["hyperparameters"]["max_steps"],
        )
    for kind in (STOPPED, "error"):
        content = _read(note_file(trial, kind))
        if {name: content.pop(name, None) for name in _DECIDING} == _deciding(trial):
            return Standing(trial, **content)
    return Standing(trial, LEFT)


def described(trial: Trial) -> dict[str, Any]:
    """What is known of a trial's ``run.json`` before it runs, with the data that it would be trained on."""
    return describe_run(trial.config) | {"data_fingerprints": trial.data_fingerprints}


def write_stopped(trial: Trial, result: Mapping[str, Any]) -> None:
    """Write down that a trial was stopped, with its last result."""
    seconds = read_history(trial.config.output_dir)[-1]["seconds"]
    known = {name: result[name] for name in ("score", "steps", "max_steps")}
    _write(trial, STOPPED, {"state": STOPPED, **known, "seconds": seconds})


def write_failed(trial: Trial, error: str, diverged: bool = False) -> None:
    """Write down what ended a trial."""
    _write(trial, "error", {"state": DIVERGED if diverged else FAILED, "error": error})


def describe_error(error: BaseException) -> tuple[str, bool]:
    """What ended a trial in a line, and whether its hyperparameters are at fault."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}", isinstance(error, Diverged)


def forget(trial: Trial) -> None:
    """Remove what was written down of an earlier attempt."""
    for kind in (STOPPED, "error"):
        note_file(trial, kind).unlink(missing_ok=True)


def note_file(trial: Trial, kind: str) -> Path:
    """The file that says how a trial ended which is not finished."""
    folder = Path(trial.config.output_dir)
    return folder.with_name(f"{folder.name}.{kind}.json")


def _write(trial: Trial, kind: str, content: Mapping[str, Any]) -> None:
    write_json(note_file(trial, kind), {**content, **_deciding(trial)})


def _deciding(trial: Trial) -> Any:
    """What a note is of: values and data, as JSON has them."""
    decided = zip(_DECIDING, (trial.config.to_dict(), trial.data_fingerprints), strict=True)
    return json.loads(json.dumps(dict(decided)))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = {f.name for f in dataclasses.fields(Standing)} | set(_DECIDING)
    is_ours = isinstance(content, dict) and {"state", "config"} <= content.keys() <= known
    return content if is_ours else {}
