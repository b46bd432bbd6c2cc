"""Chunks answered by the workers of a Ray cluster, through Ray Data."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsepeft.bulk.inputs import Source, read_chunks
from sparsepeft.bulk.plan import Plan
from sparsepeft.bulk.scorer import Scored, Scorer
from sparsepeft.clusters import local_or
from sparsepeft.devices import keep_freed_memory
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.extras import require

_IN_FLIGHT_BYTES = 256 << 20  # of chunks that are read and not yet answered, or answered and not yet written
_RETRIES = 4  # of a chunk whose worker ended
_PURPOSE = "Answering by Ray's workers"


@dataclass(frozen=True)
class RayOptions:
    """Where Ray's workers are.

    Attributes:
        address: of a running cluster, or ``"auto"``; None starts one on this machine for the time of the call, unless
            the program is connected to one already. All machines of a cluster see the files and the tasks under the
            same paths and have this package.
        workers: how many; None is one for each processor that the cluster has, or one for so many as a worker has
            threads.
    """

    address: str | None = None
    workers: int | None = None


def scored_by_ray(plan: Plan, sources: Sequence[Source], options: RayOptions) -> Generator[Scored]:
    """All chunks with their answers, in order.

    One task reads the files, a chunk after the other, as fast as these are answered. Each worker is an actor with an
    engine of its own. The chunk of a worker that ended goes to another.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or the backbone or a task cannot be loaded.
        RunFailed: a chunk could not be answered however often it was tried.
    """
    with local_or(options.address, _PURPOSE, **_settings(options, plan.threads or 1)) as ray:
        require("ray.data", "ray", _PURPOSE)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        dataset = _dataset(ray, plan, sources, options)
        try:
            for row in dataset.iter_rows():
                scored = pickle.loads(row["scored"])
                if isinstance(scored, UserError):
                    raise scored
                yield scored
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]  # what the worker's traceback ends with
            raise RunFailed(f"Ray could not answer a chunk ({last}); repeat the command to go on.") from error


def _dataset(ray: Any, plan: Plan, sources: Sequence[Source], options: RayOptions) -> Any:
    """A ``ray.data.Dataset`` whose rows, when they are asked for, are the chunks with their answers, in order."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=_IN_FLIGHT_BYTES)
    context.target_max_block_size = 1  # a chunk is a row is a block, so that none waits for others
    threads = plan.threads or 1
    workers = options.workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
    resources = {"num_cpus": threads} | ({"num_gpus": 1} if (plan.device or "cpu").startswith("cuda") else {})

    def read(batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        for number in batch["item"]:
            for chunk in read_chunks(int(number), sources[number], plan):
                yield {"chunk": [pickle.dumps(chunk)]}

    with ray.data.DataContext.current(context):
        return (
            ray.data.from_items(list(range(len(sources))), override_num_blocks=len(sources))
            .map_batches(read, batch_size=1, num_cpus=0, concurrency=1)
            .map_batches(
                _Worker,
                fn_constructor_args=(plan, list(sources)),
                batch_size=1,
                concurrency=workers,
                max_restarts=-1,
                max_task_retries=_RETRIES,
                **resources,
            )
        )


class _Worker:
    """An actor."""

    def __init__(self, plan: Plan, sources: Sequence[Source]) -> None:
        keep_freed_memory()
        self._scorer = Scorer(plan, sources)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        scored: Scored | UserError
        try:
            scored = self._scorer(pickle.loads(batch["chunk"][0]))
        except UserError as error:  # raised where it is read; here it would be tried again
            scored = error
        return {"scored": [pickle.dumps(scored)]}


def _settings(options: RayOptions, threads: int) -> dict[str, Any]:
    """Of a cluster that is started for the call: no larger than it is used."""
    workers = options.workers or max(1, (os.cpu_count() or 1) // threads)
    return {"num_cpus": workers * threads, "object_store_memory": 2 * _IN_FLIGHT_BYTES}
