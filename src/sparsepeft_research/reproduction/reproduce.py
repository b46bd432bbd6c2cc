"""A table from start to finish: search if asked to, run what is left, compute, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepeft_research.reproduction.devices import read_devices
from sparsepeft_research.reproduction.grid import GridSearch, has_diverged
from sparsepeft_research.reproduction.matrix import Matrix
from sparsepeft_research.reproduction.measuring import StepTimes
from sparsepeft_research.reproduction.planning import Planned, plan
from sparsepeft_research.reproduction.results import MAX_OTHERS
from sparsepeft_research.reproduction.runner import Watcher, run_all
from sparsepeft_research.reproduction.tables import Table, make_table
from sparsepeft_research.reproduction.writing import write_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of a matrix.

    Attributes:
        table: computed from the results that are there.
        files: the table's; empty while there is no result.
        failures: type and message by the run's name.
    """

    table: Table
    files: tuple[Path, ...]
    failures: dict[str, Any]


def reproduce(
    name: str,
    matrix: Matrix,
    *,
    grid: bool = False,
    run: bool = True,
    keep_weights: bool = False,
    device_files: Sequence[Path] = (),
    watcher: Watcher | None = None,
) -> Outcome:
    """Run what a matrix lacks, and write its table.

    Args:
        name: ``"table1"``, ``"table2"`` or ``"table3"``.
        matrix: its runs.
        grid: choose each task's and method's hyperparameters by the paper's grid search first.
        run: False computes the table of the results that are there.
        keep_weights: leave the trained weights in each run's work folder.
        device_files: of ``sparsepeft benchmark inference --device``, for table 1.
        watcher: told about each run.

    Raises:
        UserError: a name, value, model or the data cannot be used; found before the first run.
    """
    watcher = watcher or Watcher()
    devices = read_devices(device_files, matrix.values.get("model"))
    search = GridSearch(matrix) if grid else None
    runs = matrix.runs() if search is None else search.runs()
    failures: dict[str, Any] = {}
    if run:
        num_points = len(search.points) if search else 0
        watcher.begins(num_points + len(matrix.pairs()) * len(matrix.names()[2]))
        if search:
            failed = run_all(search.points, watcher)
            lost = {point.name for point in search.points if has_diverged(point)}
            failures = {point: error for point, error in failed.items() if point not in lost}
            runs = search.runs()
        failures |= run_all(runs, watcher, keep_weights)
    table = make_table(name, runs, search.chosen() if search else None, devices)
    files = write_table(table, matrix.output_dir) if table.rows else []
    return Outcome(table, tuple(files), failures)


def plan_of(
    matrix: Matrix,
    grid: bool = False,
    *,
    measure: bool = False,
    progress: Callable[[str], object] = lambda message: None,
) -> list[Planned]:
    """How every run of a matrix stands; with a grid search, its points and the runs that are decided. Changes nothing.

    Args:
        matrix: its runs.
        grid: with the search.
        measure: take the time of a few steps of each method that no run has been done with, in a temporary folder.
        progress: told what is being measured.

    Raises:
        UserError: as :func:`reproduce`.
    """
    search = GridSearch(matrix) if grid else None
    runs = matrix.runs() if search is None else [*search.points, *search.runs()]
    times = StepTimes(runs, progress) if measure else None
    planned = plan(runs, times)
    if times is not None and times.others_cpu_share > MAX_OTHERS:
        logger.warning(
            "Other programs had up to %.0f%% of the processors' time while steps were measured; on an idle machine the "
            "runs take less.",
            100 * times.others_cpu_share,
        )
    return planned
