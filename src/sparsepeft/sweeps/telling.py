"""Telling a watcher how a trial has ended."""

from __future__ import annotations

from pathlib import Path

from sparsepeft.runs.files import read_results
from sparsepeft.sweeps.files import DONE, LEFT, STOPPED, Standing
from sparsepeft.training.callbacks import Watcher


def tell(watcher: Watcher, standing: Standing, here: bool) -> None:
    """Tell a watcher how a trial stands that is not left; ``here`` unless that was so before."""
    name, folder = standing.trial.name, Path(standing.trial.config.output_dir)
    if standing.state == DONE:
        watcher.finished(name, read_results(folder), here)
    elif standing.state == STOPPED:
        watcher.stopped(name, standing.steps or 0, standing.max_steps or 0, standing.score or 0.0, here)
    elif standing.state != LEFT:
        kind, _, message = str(standing.error).partition(": ")
        watcher.failed(name, {"type": kind, "message": message})
