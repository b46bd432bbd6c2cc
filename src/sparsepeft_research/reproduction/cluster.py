"""The runs of a matrix on a Ray cluster: each a task that is started again when its worker dies; the same files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsepeft.arguments import check_number, check_whole
from sparsepeft.clusters import check_room, local_or
from sparsepeft.training.callbacks import Watcher
from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.results import find_result
from sparsepeft_research.reproduction.runner import check_results, run_all

_PURPOSE = "`--ray`"
_MAX_FAILURES = 3


@dataclass(frozen=True)
class Cluster:
    """Where runs are done at once.

    Args:
        address: of a running cluster, see :func:`sparsepeft.clusters.local_or`; None starts one on this machine.
        cpus_per_run, gpus_per_run: that a run needs; it computes with as many threads as CPUs.

    Raises:
        UserError: a number is out of its range.
    """

    address: str | None = None
    cpus_per_run: int = 1
    gpus_per_run: float = 0

    def __post_init__(self) -> None:
        check_whole("cpus_per_run", self.cpus_per_run)
        check_number("gpus_per_run", self.gpus_per_run, least=0)


class _Told(Watcher):
    """Remembers whether a run was done here."""

    def __init__(self) -> None:
        self.here = False

    def finished(self, run: str, result: dict[str, Any], here: bool) -> None:
        self.here = here


def run_on(cluster: Cluster, runs: Sequence[Run], watcher: Watcher, keep_weights: bool = False) -> dict[str, Any]:
    """Do what is not done yet, on a cluster: as :func:`run_all` does it, several at once.

    Args:
        cluster: whose machines all see the folder of the results.
        runs: as :meth:`Matrix.runs` gives them, with absolute folders.
        watcher: told about each run.
        keep_weights: leave the trained weights in each run's work folder.

    Returns:
        What failed: type and message by the run's name.

    Raises:
        UserError: Ray is missing, there is no such cluster, this machine has less than a run needs, or the results'
            folder cannot be written.
    """
    check_results(runs)
    left = []
    for run in runs:
        if (result := find_result(run).result) is not None:
            watcher.finished(run.name, result, here=False)
        else:
            left.append(run)
    if not left:
        return {}
    failures: dict[str, Any] = {}
    with local_or(cluster.address, _PURPOSE) as ray:
        check_room(ray, cluster.address, cpus_per_run=cluster.cpus_per_run, gpus_per_run=cluster.gpus_per_run)
        task = ray.remote(_run).options(
            num_cpus=cluster.cpus_per_run, num_gpus=cluster.gpus_per_run, max_retries=_MAX_FAILURES
        )
        pending = {task.remote(run, keep_weights, cluster.cpus_per_run): run for run in left}
        while pending:
            (done,), _ = ray.wait(list(pending))
            run = pending.pop(done)
            try:
                error, here = ray.get(done)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as died:
                said = f"its worker process died {_MAX_FAILURES + 1} times"
                error, here = {"type": type(died).__name__, "message": said}, True
            result = find_result(run).result
            if error is None and result is not None:
                watcher.finished(run.name, result, here)
            else:
                failures[run.name] = error
                watcher.failed(run.name, error)
    return failures


def _run(run: Run, keep_weights: bool, threads: int) -> tuple[dict[str, Any] | None, bool]:
    """One run, in a worker: what ended it, and whether it was done here."""
    import torch

    from sparsepeft.devices import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    told = _Told()
    return run_all([run], told, keep_weights).get(run.name), told.here
