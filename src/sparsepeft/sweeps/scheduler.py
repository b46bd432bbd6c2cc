"""Which trials go on: successive halving (ASHA) within each task, as scores of different tasks do not compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

SCORE, PROGRESS = "score", "progress"
WHOLE = 100.0  # of progress, in percent of a run's steps


@dataclass(frozen=True)
class PastTrial:
    """A trial that was ended before this sweep was started again, as far as a scheduler looks at it.

    Attributes:
        trial_id: its name.
    """

    trial_id: str


class HalvingByTask(FIFOScheduler):
    """Ray's ASHA for each group of trials.

    Source: arXiv:1810.05934, algorithm 2, in the form that Ray Tune has: a trial is stopped at a rung unless it is
    among the best 1 / ``reduction_factor`` of those that have come there.

    Args:
        groups: of trials, by their names.
        grace_period: percent of its steps that each trial does.
        reduction_factor: of the trials, from rung to rung; also the factor between the steps of two rungs.
        on_stop: told the name and the last result of each trial that is stopped.
    """

    def __init__(
        self,
        groups: Mapping[str, str],
        grace_period: float,
        reduction_factor: float,
        on_stop: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        super().__init__()
        self._on_stop = on_stop
        settings: dict[str, Any] = {
            "time_attr": PROGRESS,
            "metric": SCORE,
            "mode": "max",
            "max_t": WHOLE,
            "grace_period": grace_period,
            "reduction_factor": reduction_factor,
            "stop_last_trials": False,  # what has done all of its steps is finished, not stopped
        }
        by_group = {group: AsyncHyperBandScheduler(**settings) for group in dict.fromkeys(groups.values())}
        self._of_trial: dict[str, Any] = {name: by_group[group] for name, group in groups.items()}

    def remember(self, name: str, results: Iterable[Mapping[str, Any]]) -> None:
        """Take into account how far a trial came that is not run any more, with its results in order."""
        scheduler, trial = self._of_trial[name], PastTrial(name)
        scheduler.on_trial_add(None, trial)
        for result in results:
            scheduler.on_trial_result(None, trial, dict(result))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        if result.get(PROGRESS, 0.0) >= WHOLE:
            return str(TrialScheduler.CONTINUE)
        decision = str(self._of(trial).on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self._on_stop(trial.config["name"], result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has ended."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """A trial is not run at all."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def _of(self, trial: Any) -> Any:
        return self._of_trial[trial.config["name"]]
