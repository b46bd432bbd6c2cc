"""What is left of a matrix, and how long it may take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.measuring import StepTimes
from sparsepeft_research.reproduction.results import ABOUT, find_result, read_error
from sparsepeft_research.reproduction.runner import claim

SAME = "results of the same task and method"
METHOD = "results of the method on other tasks"
MEASURED = "steps measured here"
ANY = "results of other methods"


@dataclass(frozen=True)
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
    results = {run.name: found.result for run in runs if (found := find_result(run)).result is not None}
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
