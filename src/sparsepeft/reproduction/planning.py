"""What is left of a matrix, and how long it may take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsepeft.reproduction.matrix import Run
from sparsepeft.reproduction.results import ABOUT, find_result, read_error
from sparsepeft.reproduction.runner import claim


@dataclass(frozen=True)
class Planned:
    """One run and how it stands.

    Attributes:
        run: the run.
        state: ``"done"``, ``"pending"``, ``"running"`` (in another process), ``"failed"`` (is tried again) or
            ``"stale"`` (its result file is not counted).
        detail: why, for the last two.
        seconds: how long it took, or is estimated to take; None is unknown.
        result: its result, if done.
    """

    run: Run
    state: str
    detail: str = ""
    seconds: float | None = None
    result: dict[str, Any] | None = None


def plan(runs: Sequence[Run]) -> list[Planned]:
    """How every run stands, in order. Changes nothing."""
    results = {run.name: found.result for run in runs if (found := find_result(run)).result is not None}
    estimate = _Estimate([(run, results[run.name]) for run in runs if run.name in results])
    planned = []
    for run in runs:
        if run.name in results:
            planned.append(Planned(run, "done", seconds=seconds_of(results[run.name]), result=results[run.name]))
        else:
            state, detail = _state(run)
            planned.append(Planned(run, state, detail, estimate.seconds(run)))
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
    """Seconds from finished runs: of the same task and method, else per character read by that method, else by any."""

    def __init__(self, finished: Sequence[tuple[Run, dict[str, Any]]]) -> None:
        known = [(run, seconds) for run, result in finished if (seconds := seconds_of(result)) is not None]
        self._same: dict[tuple[str, str], list[float]] = {}
        self._rates: dict[str, list[float]] = {}
        for run, seconds in known:
            self._same.setdefault((run.config.task, run.config.method), []).append(seconds)
            self._rates.setdefault(run.config.method, []).append(seconds / run.work)

    def seconds(self, run: Run) -> float | None:
        same = self._same.get((run.config.task, run.config.method))
        if same:
            return statistics.mean(same)
        rates = self._rates.get(run.config.method) or [rate for rates in self._rates.values() for rate in rates]
        return statistics.mean(rates) * run.work if rates else None
