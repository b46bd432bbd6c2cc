"""What is left of a matrix, and how long it may take: from finished runs, else from a few steps on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import RunFailed
from sparsepeft.provenance import OtherLoad
from sparsepeft.training import RunConfig
from sparsepeft.training.dry_run import dry_run
from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.results import ABOUT, find_result, read_error
from sparsepeft_research.reproduction.runner import claim

SAME = "results of the same task and method"
METHOD = "results of the method on other tasks"
MEASURED = "steps measured here"
ANY = "results of other methods"
STEPS = 5  # of a dry run, which takes their median
FORWARD_SHARE = 1 / 3  # of a training step's time: a backward pass takes about twice as long as a forward pass
_EXAMPLES = 2000  # enough for batches as long as the task's
_CHARS_PER_TOKEN = 5
_SAME_LENGTH = 1.3  # tasks whose mean lengths differ by less are not both measured


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run and how it stands.

    Attributes:
        run: the run.
        state: ``"done"``, ``"pending"``, ``"running"`` (in another process), ``"failed"`` (is tried again) or
            ``"stale"`` (its result file is not counted).
        detail: why, for the last two.
        seconds: how long it took, or is estimated to take; None is unknown.
        estimate: what the seconds of a run that is not done are made of: :data:`SAME`, :data:`METHOD`,
            :data:`MEASURED` or :data:`ANY`; empty where they are known or unknown.
        result: its result, if done.
    """

    run: Run
    state: str
    detail: str = ""
    seconds: float | None = None
    estimate: str = ""
    result: dict[str, Any] | None = None


def plan(runs: Sequence[Run], times: StepTimes | None = None) -> list[Planned]:
    """How every run stands, in order. Changes nothing.

    Args:
        runs: the runs.
        times: measures steps of the methods that no run has been done with; None estimates from what has run alone.
    """
    results = {run.name: stored.result for run in runs if (stored := find_result(run)).result is not None}
    estimate = _Estimate([(run, results[run.name]) for run in runs if run.name in results], times)
    planned = []
    for run in runs:
        if run.name in results:
            planned.append(Planned(run, "done", seconds=seconds_of(results[run.name]), result=results[run.name]))
        else:
            state, detail = _state(run)
            planned.append(Planned(run, state, detail, *estimate.seconds(run)))
    return planned


def seconds_of(result: dict[str, Any]) -> float | None:
    """How long a run took from reading its data to its scores; None if it was interrupted."""
    about = result[ABOUT]
    return None if about.get("resumed") else about.get("seconds")


def _state(run: Run) -> tuple[str, str]:
    if run.lock_file.exists():
        with claim(run) as claimed:
            if not claimed:
                return "running", ""
    if problem := find_result(run).problem:
        return "stale", problem
    if run.error_file.exists():
        return "failed", read_error(run.error_file)["message"]
    return "pending", ""


class _Estimate:
    """Seconds from finished runs of the same task and method, else per character read by that method, else from
    measured steps, else per character read by any method.
    """

    def __init__(self, finished: Sequence[tuple[Run, dict[str, Any]]], times: StepTimes | None) -> None:
        self._times = times
        known = [(run, seconds) for run, result in finished if (seconds := seconds_of(result)) is not None]
        self._same: dict[tuple[str, str], list[float]] = {}
        self._rates: dict[str, list[float]] = {}
        for run, seconds in known:
            self._same.setdefault((run.config.task, run.config.method), []).append(seconds)
            self._rates.setdefault(run.config.method, []).append(seconds / run.work)

    def seconds(self, run: Run) -> tuple[float | None, str]:
        """The estimate, and what it is made of."""
        if same := self._same.get((run.config.task, run.config.method)):
            return statistics.mean(same), SAME
        if rates := self._rates.get(run.config.method):
            return statistics.mean(rates) * run.work, METHOD
        if self._times is not None and (seconds := self._times.seconds(run)) is not None:
            return seconds, MEASURED
        if rates := [rate for rates in self._rates.values() for rate in rates]:
            return statistics.mean(rates) * run.work, ANY
        return None, ""


class StepTimes:
    """Estimates from measured steps of each method, on the tasks with the shortest and the longest texts.

    Between these the time of a step grows linearly with the texts' mean length. Nothing is downloaded, and nothing is
    left on the disk.

    Args:
        runs: the matrix.
        progress: told what is being measured.
    """

    def __init__(self, runs: Sequence[Run], progress: Callable[[str], object] = lambda message: None) -> None:
        self._runs, self._progress = runs, progress
        self._measured: dict[str, list[_Measured]] = {}
        self._others: list[float] = []

    def seconds(self, run: Run) -> float | None:
        """How long a run may take in all; None where the model is not on this machine, or its steps fail."""
        method = run.config.method
        if method not in self._measured:
            self._measured[method] = [timed for one in self._ends(method) if (timed := self._measure(one))]
        measured = self._measured[method]
        if not measured:
            return None
        step = _between(measured, _chars(run))
        batch = run.config.recipe_values().batch_size
        return measured[0].setup + step * (run.steps + FORWARD_SHARE * run.num_scored / batch)

    @property
    def others_cpu_share(self) -> float:
        """The largest share of the processors' time that other programs had during a measurement, 0 to 1."""
        return max(self._others, default=0.0)

    def _ends(self, method: str) -> list[Run]:
        """The runs of a method with the shortest and the longest texts."""
        runs = sorted((run for run in self._runs if run.config.method == method), key=_chars)
        is_one = _chars(runs[-1]) < _SAME_LENGTH * _chars(runs[0])
        return runs[:1] if is_one else [runs[0], runs[-1]]

    def _measure(self, run: Run) -> _Measured | None:
        if not _is_here(run.config.model):
            return None
        self._progress(f"measuring {run.config.method} on {run.config.task}: {STEPS} steps")
        load = OtherLoad()
        try:
            return _measure(run.config, _chars(run))
        except RunFailed:
            return None
        finally:
            self._others += [share] if (share := load.share()) is not None else []


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What a run took: ``setup`` and ``step`` in seconds, with texts of ``chars`` characters."""

    chars: float
    setup: float
    step: float


def _measure(config: RunConfig, chars: float) -> _Measured:
    """The first steps of a run, on a part of its data and in a folder that goes.

    Raises:
        RunFailed: its steps do.
    """
    examples = None if config.few_shot else min(_EXAMPLES, config.max_train_samples or _EXAMPLES)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            # On the selection part, which leaves the parts alone that are not trained on.
            part: dict[str, Any] = {"max_train_samples": examples, "score_on": "selection"}
            step = dry_run(dataclasses.replace(config, output_dir=str(Path(folder) / "run"), **part))[
                "seconds_per_step"
            ]
    finally:
        gc.collect()  # a Trainer and its model hold each other
        torch.compiler.reset()
    return _Measured(chars, time.perf_counter() - start - STEPS * step, step)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _chars(run: Run) -> float:
    """Mean characters of a text that the model reads."""
    longest = run.config.max_length
    return min(run.facts.mean_chars, _CHARS_PER_TOKEN * longest if longest else run.facts.mean_chars)


def _between(measured: Sequence[_Measured], chars: float) -> float:
    """The time of a step, linear between the shortest and the longest texts, and proportional from a single one."""
    first, last = measured[0], measured[-1]
    if first is last:
        return first.step
    share = (chars - first.chars) / (last.chars - first.chars)
    return first.step + share * (last.step - first.step)


def _is_here(model: str | None) -> bool:
    """Whether the weights are on this machine."""
    resolved = resolve_model(model)
    if Path(resolved).exists():
        return True
    return any(
        isinstance(try_to_load_from_cache(resolved, name), str) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
