"""What to measure, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsepeft.errors import UserError, unknown_name
from sparsepeft_research.benchmarks.devices import DEVICES
from sparsepeft_research.benchmarks.inference.systems import BACKBONE, ENGINE, PEERS, PRECISIONS, SYSTEMS

WORKLOADS = ("fixed", "tasks")


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to measure.

    Args:
        model: ``"roberta-base"`` (random weights), ``"minilm"``, a hub id or a folder.
        systems: some of ``SYSTEMS``; None takes all for ``"fixed"``, and for
            ``"tasks"``, where all precisions are in memory at once, those that the factors are made of.
        precisions: some of ``PRECISIONS``; the first is that of mixed batches.
        workload: ``"fixed"``: batches of texts of one length; ``"tasks"``: the texts of tasks as long as they are.
        shapes: batch size and length of each fixed workload; batches of one are timed as latency.
        tasks: of the workload ``"tasks"``: their validation texts.
        data_dir: folder with the tasks' files.
        max_inputs: texts of a task; a sample where there are more. None takes all.
        mixed: also measure batches of nine tasks, nine tasks for each text, and a hundred tasks in memory (with
            ``"fixed"``, at the first shape).
        threads: of each process; None takes torch's number.
        emulate: the name of an edge device, see ``benchmarks.devices.emulate``; None is this machine.
        peers_python: the Python of an environment with ``adapters``; None leaves the peers out.
        repeats: timed passes of each candidate, each time its process is started.
        starts: times that all processes are started; what a process finds in memory makes it a little faster or slower.
        one_process: the bare backbone and its adapted forms run in one process and share its weights, so that what two
            processes find in memory does not part them; their peak memory cannot be told apart then.
        idle_wait_s: seconds to wait for an idle machine before each round.
        seed: of weights and texts.

    Raises:
        UserError: a value is unknown or out of range.
    """

    model: str = "roberta-base"
    systems: tuple[str, ...] | None = None
    precisions: tuple[str, ...] = PRECISIONS
    workload: str = "fixed"
    shapes: tuple[tuple[int, int], ...] = ((32, 128), (1, 32))
    tasks: tuple[str, ...] = ("sst2", "mrpc", "qnli")
    data_dir: Path | None = None
    max_inputs: int | None = 256
    mixed: bool = False
    threads: int | None = None
    emulate: str | None = None
    peers_python: Path | None = None
    repeats: int = 9
    starts: int = 1
    one_process: bool = False
    idle_wait_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, names, valid in (
            ("The system", self.chosen_systems, SYSTEMS),
            ("The precision", self.precisions, PRECISIONS),
            ("The workload", (self.workload,), WORKLOADS),
            ("The device", (self.emulate,) if self.emulate is not None else (), DEVICES),
        ):
            for name in names:
                if name not in valid:
                    raise UserError(unknown_name(kind, name, valid))
        for option, values in (
            ("systems", self.chosen_systems),
            ("precisions", self.precisions),
            ("shapes", self.shapes),
        ):
            if not values:
                raise UserError(f"No `{option}` were given; pass at least one.")
        shapes = ",".join("x".join(map(str, shape)) for shape in self.shapes)
        if any(min(shape) < 1 for shape in self.shapes):
            raise UserError(f"`shapes={shapes}` was given; expected numbers of at least 1, as in 32x128.")
        if self.repeats < 2:
            raise UserError(f"`repeats={self.repeats}` was given; quartiles need at least 2.")
        if self.starts < 1:
            raise UserError(f"`starts={self.starts}` was given; pass at least 1.")
        if self.max_inputs is not None and self.max_inputs < 1:
            raise UserError(f"`max_inputs={self.max_inputs}` was given; pass at least 1, or None for all.")
        if self.mixed and (self.workload != "fixed" or self.precisions[0] not in ("float32", "bfloat16")):
            raise UserError(
                "`mixed=True` was given, but batches are mixed with the `workload` fixed only, in the first of the "
                "`precisions`, which must be float32 or bfloat16."
            )
        if self.peers_python is not None and not self.peers_python.is_file():
            raise UserError(
                f"`peers_python={self.peers_python}` was given, but there is no such file; pass the Python of an "
                "environment with the package adapters, or leave it out."
            )

    @property
    def chosen_systems(self) -> tuple[str, ...]:
        """The systems to measure."""
        if self.systems is not None:
            return self.systems
        return SYSTEMS if self.workload == "fixed" else (BACKBONE, "spartan", ENGINE, *PEERS)

    @property
    def num_threads(self) -> int:
        """Threads of each process: on an emulated device no more than it has cores."""
        threads = self.threads or torch.get_num_threads()
        return threads if self.emulate is None else min(threads, DEVICES[self.emulate].num_cores)
