"""What Ray Tune tells of its trials, for a watcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from sparsepeft.sweeps.files import standing_of, write_failed
from sparsepeft.sweeps.space import Trial
from sparsepeft.sweeps.telling import tell
from sparsepeft.training.callbacks import Watcher


class Watching(tune.Callback):
    """Tells a watcher, and writes down which trials are given up.

    Args:
        trials: by name.
        watcher: is told.
        max_failures: how often Tune starts a trial again.
    """

    def __init__(self, trials: Mapping[str, Trial], watcher: Watcher, max_failures: int) -> None:
        self._trials, self._watcher, self._max_failures = trials, watcher, max_failures

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps its callbacks in a file, from which no sweep goes on, and a terminal cannot be in it."""
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """A trial has a score."""
        if "steps" in result:
            self._watcher.scored(trial.config["name"], result["steps"], result["max_steps"], result["score"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial is finished, was stopped, or has failed by itself."""
        tell(self._watcher, standing_of(self._trials[trial.config["name"]]), here=True)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial's worker died too often."""
        given_up = self._trials[trial.config["name"]]
        write_failed(given_up, f"WorkerDied: its worker process died {self._max_failures + 1} times")
        tell(self._watcher, standing_of(given_up), here=True)
