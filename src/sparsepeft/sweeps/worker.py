"""A trial in a worker process of Ray: an ordinary run, which tells its scores on the way."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune
from transformers import TrainerCallback

from sparsepeft.devices import keep_freed_memory
from sparsepeft.folders import in_use
from sparsepeft.runs.history import read_history
from sparsepeft.sweeps.files import DONE, Standing, describe_error, forget, standing_of, write_failed
from sparsepeft.sweeps.scheduler import PROGRESS, SCORE, WHOLE
from sparsepeft.sweeps.space import Trial
from sparsepeft.training.run import train

_METRICS = "eval_score"
_WAIT_SECONDS = 120.0  # for a worker that was killed to be gone
_POLL_SECONDS = 0.2


def run_trial(config: Mapping[str, str], trials: Mapping[str, Trial], threads: int, overwrite: bool) -> None:
    """Do a trial, from its last checkpoint if there is one; what ends it is written down, as it would end it again.

    Args:
        config: the ``name`` of the trial.
        trials: all of them, by name.
        threads: for the computation.
        overwrite: runs with other values may be replaced.
    """
    trial = trials[config["name"]]
    torch.set_num_threads(threads)
    keep_freed_memory()
    forget(trial)
    _wait_for(Path(trial.config.output_dir))
    try:
        if standing_of(trial, overwrite).state != DONE:  # or the worker died between the run's end and its report
            train(trial.config, [_Reporter(trial)], overwrite)
        done = standing_of(trial)
    except Exception as error:  # the boundary between trials: whatever ends one is recorded, and the others go on
        write_failed(trial, *describe_error(error))
        return
    finally:
        gc.collect()  # a Trainer and its model hold each other
        torch.compiler.reset()
    tune.report(final_result(done))


def final_result(done: Standing) -> dict[str, Any]:
    """What a finished trial reports."""
    return {SCORE: done.score, PROGRESS: WHOLE}


def past_results(trial: Trial, max_steps: int, until: int | None = None) -> Iterator[dict[str, Any]]:
    """What a trial has reported, by its history.

    Args:
        trial: whose folder has a history.
        max_steps: of the run.
        until: the last step; None is all of them.
    """
    best = -math.inf
    for line in read_history(trial.config.output_dir):
        if line.get(_METRICS) is not None and (until is None or line["step"] <= until):
            best = max(best, line[_METRICS])
            yield {SCORE: best, PROGRESS: WHOLE * line["step"] / max_steps}


class _Reporter(TrainerCallback):
    """Reports the best score so far, of the checkpoint that would be kept, whenever the selection part was scored."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._best = trial, -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report what a run that goes on has reported before."""
        if state.global_step:
            for result in past_results(self._trial, state.max_steps, state.global_step):
                self._best = result[SCORE]
                tune.report(result | _at(state.global_step, state.max_steps))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report a score; here a trial that is to be stopped ends. The last step's is left to the finished run."""
        score = (metrics or {}).get(_METRICS)
        if score is None or not math.isfinite(score) or state.global_step >= state.max_steps:
            return
        self._best = max(self._best, score)
        progress = WHOLE * state.global_step / state.max_steps
        tune.report({SCORE: self._best, PROGRESS: progress} | _at(state.global_step, state.max_steps))


def _at(step: int, max_steps: int) -> dict[str, int]:
    return {"steps": step, "max_steps": max_steps}


def _wait_for(folder: Path) -> None:
    """Wait until no process holds a folder."""
    end = time.monotonic() + _WAIT_SECONDS
    while in_use(folder) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
