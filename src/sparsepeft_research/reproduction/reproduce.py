"""A table from start to finish: search if asked to, run what is left, compute, write."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.storage.counting import load_config
from sparsepeft.training.callbacks import Watcher
from sparsepeft_research.benchmarks.devices import DEVICES
from sparsepeft_research.benchmarks.inference.report import device_throughput
from sparsepeft_research.benchmarks.inference.workloads import architecture
from sparsepeft_research.reproduction.cluster import Cluster, run_on
from sparsepeft_research.reproduction.grid import GridSearch, has_diverged
from sparsepeft_research.reproduction.matrix import Matrix, Run
from sparsepeft_research.reproduction.planning import Planned, StepTimes, plan
from sparsepeft_research.reproduction.render import write_table
from sparsepeft_research.reproduction.results import MAX_OTHERS
from sparsepeft_research.reproduction.runner import run_all
from sparsepeft_research.reproduction.tables import Table, make_table

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
    cluster: Cluster | None = None,
) -> Outcome:
    """Run what a matrix lacks, and write its table.

    Args:
        name: ``"table1"``, ``"table2"`` or ``"table3"``.
        matrix: its runs.
        grid: choose each task's and method's hyperparameters by the paper's grid search first.
        run: False computes the table of the results that are there.
        keep_weights: leave the trained weights in each run's work folder.
        device_files: of ``sparsepeft benchmark inference --emulate``, for table 1.
        watcher: told about each run.
        cluster: does several runs at once; None does them here, one after the other.

    Raises:
        UserError: a name, value, model, the data or the cluster cannot be used; found before the first run.
    """
    watcher = watcher or Watcher()
    if cluster is not None:  # whose workers have other working directories
        matrix = dataclasses.replace(matrix, output_dir=matrix.output_dir.absolute())
    devices = read_devices(device_files, matrix.values.get("model"))
    search = GridSearch(matrix) if grid else None
    runs = matrix.runs() if search is None else search.runs()
    failures: dict[str, Any] = {}
    if run:
        num_points = len(search.points) if search else 0
        watcher.begins(num_points + len(matrix.pairs()) * len(matrix.names()[2]))
        if search:
            failed = _run(search.points, watcher, cluster)
            lost = {point.name for point in search.points if has_diverged(point)}
            failures = {point: error for point, error in failed.items() if point not in lost}
            runs = search.runs()
        failures |= _run(runs, watcher, cluster, keep_weights)
    table = make_table(name, runs, search.chosen() if search else None, devices)
    files = write_table(table, matrix.output_dir) if table.rows else []
    return Outcome(table, tuple(files), failures)


def _run(runs: Sequence[Run], watcher: Watcher, cluster: Cluster | None, keep_weights: bool = False) -> dict[str, Any]:
    if cluster is None:
        return run_all(runs, watcher, keep_weights)
    return run_on(cluster, runs, watcher, keep_weights)


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


def read_devices(files: Sequence[Path], model: str | None) -> dict[str, dict[str, float]]:
    """Read table 1's inputs per minute by device, then by method.

    Args:
        files: of ``sparsepeft benchmark inference --emulate``.
        model: the backbone of the table; its weights do not matter for speed, its sizes do.

    Raises:
        UserError: a file cannot be read, is not of an emulated device, or of a backbone of other sizes.
    """
    by_device: dict[str, dict[str, float]] = {}
    wanted = architecture(load_config(resolve_model(model))) if files else {}
    for path in files:
        try:
            device, measured, rates = device_throughput(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} holds no throughput of a device ({error}); write it with `sparsepeft benchmark inference "
                f"--emulate {next(iter(DEVICES))} --output {path}`."
            ) from error
        if measured != wanted:
            raise UserError(
                f"{path} was measured with a backbone of other sizes ({measured}) than the table's ({wanted}); measure "
                "the table's own `model`."
            )
        by_device[device] = rates
    return by_device
