"""Doing the runs of a matrix: each once, by whichever process comes first, and going on after a failure."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from sparsepeft.errors import UserError
from sparsepeft.folders import write_json
from sparsepeft.methods.recipes import Recipe
from sparsepeft.provenance import environment
from sparsepeft.runs.files import RESULTS, read_run
from sparsepeft.runs.folder import can_resume
from sparsepeft.training import train
from sparsepeft.training.callbacks import Watcher
from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.results import (
    ABOUT,
    about,
    find_result,
    read_error,
    read_result,
    same_values,
    write_result,
)

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


def run_all(runs: Sequence[Run], watcher: Watcher | None = None, keep_weights: bool = False) -> dict[str, Any]:
    """Do what is not done yet.

    Args:
        runs: as :meth:`Matrix.runs` gives them.
        watcher: told about each run.
        keep_weights: leave the trained weights in each run's work folder.

    Returns:
        What failed: the content of the error file by the run's name.

    Raises:
        UserError: the results' folder cannot be written.
    """
    watcher = watcher or Watcher()
    start = time.time()
    failures: dict[str, Any] = {}
    check_results(runs)
    left, num_announced = list(runs), 0
    while left:
        busy = []
        for run in left:
            with claim(run) as claimed:
                if not claimed:
                    busy.append(run)
                elif error := _do(run, watcher, keep_weights, start):
                    failures[run.name] = error
        if busy and len(busy) != num_announced:
            watcher.waiting([run.name for run in busy])
        left, num_announced = busy, len(busy)
        if left:
            time.sleep(_POLL_SECONDS)
    return failures


def check_results(runs: Sequence[Run]) -> None:
    """Make the folder of each run's lock, and warn of result files that are not counted.

    Raises:
        UserError: a folder cannot be made.
    """
    for run in runs:
        folder = run.lock_file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as refused:
            raise UserError(f"The folder {folder} cannot be made ({refused}); pass another `output_dir`.") from refused
        if problem := find_result(run).problem:
            logger.warning(
                "%s is not counted: %s. The run is done again, and the file then moved aside.", run.result_file, problem
            )


@contextlib.contextmanager
def claim(run: Run) -> Iterator[bool]:
    """Hold a run's lock, which the system releases however this process ends; False if another process has it."""
    lock = FileLock(run.lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _do(run: Run, watcher: Watcher, keep_weights: bool, start: float) -> dict[str, Any] | None:
    """One run, whose lock is held; what its error file says if it failed."""
    if (result := find_result(run).result) is not None:
        watcher.finished(run.name, result, here=False)
        return None
    if run.error_file.exists() and run.error_file.stat().st_mtime >= start:
        content = read_error(run.error_file)  # another process of this matrix has just tried
        watcher.failed(run.name, content)
        return content
    try:
        result = _train(run, watcher.callbacks(run.name))
        write_result(run, result)
    except Exception as error:  # the boundary between runs: whatever ends one is recorded, and the others go on
        content = {
            "type": type(error).__name__,
            "message": " ".join(str(error).split()),
            "traceback": traceback.format_exc(),
            "config": run.config.to_dict(),
            "environment": environment(),
        }
        write_json(run.error_file, content)
        watcher.failed(run.name, content)
        return content
    finally:
        gc.collect()  # a Trainer and its model hold each other
        torch.compiler.reset()  # else the recompile limit would be reached after a few models
    if not keep_weights:
        shutil.rmtree(run.work_folder, ignore_errors=True)
    watcher.finished(run.name, result, here=True)
    return None


def _train(run: Run, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """The run's result: from its work folder if it was finished there, else by training, from its last checkpoint."""
    folder = run.work_folder
    if (folder / RESULTS).exists() and _is_this_run(run, folder):
        stored = read_result(run, folder / RESULTS, {ABOUT: about(run, None, resumed=True)}).result
        if stored is not None:
            return stored
    resumed, start = can_resume(folder, run.config), time.perf_counter()
    result = train(run.config, callbacks, overwrite=True)  # which goes on with this run, but not with another
    return {**result, ABOUT: about(run, round(time.perf_counter() - start, 1), resumed)}


def _is_this_run(run: Run, folder: Path) -> bool:
    """Whether a work folder holds this run, finished, rather than one with other values."""
    try:
        before = read_run(folder)
    except UserError:
        return False
    same_config = before.get("config") == json.loads(json.dumps(run.config.to_dict()))
    return same_config and not same_values(Recipe, before.get("recipe"), vars(run.config.recipe_values()))
