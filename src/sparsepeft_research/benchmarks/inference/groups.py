"""Which systems are timed against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from sparsepeft_research.benchmarks.inference.exported import EXPORTED
from sparsepeft_research.benchmarks.inference.systems import QUANTIZED, SHARING, export_format
from sparsepeft_research.benchmarks.inference.workloads import BY_TOKENS, PADDED, Plan, Planner
from sparsepeft_research.benchmarks.settings import (
    BACKBONE,
    ENGINE,
    ENGINE_UPPER,
    FULL,
    PEERS,
    UNFUSED,
    UNQUANTIZED,
    InferenceBenchmark,
)

NUM_TASKS = 9


@dataclass(frozen=True)
class Candidate:
    """A system in a precision, with as many tasks as it holds and the plans it runs."""

    system: str
    precision: str
    plans: tuple[Plan, ...]
    num_tasks: int = 1
    in_one_process: bool = False

    @property
    def process(self) -> str:
        """Which of a group's processes it runs in: its own, or that of all candidates that share the backbone."""
        return f"shared {self.precision}" if self.in_one_process else self.name

    @property
    def name(self) -> str:
        """``"spartan bfloat16"``."""
        return f"{self.system} {self.precision}"


@dataclass(frozen=True)
class Group:
    """Candidates that are timed against each other."""

    name: str
    candidates: tuple[Candidate, ...]


class Grouping:
    """Makes the groups of a benchmark.

    Args:
        benchmark: what to measure.
        planner: makes the plans.

    Attributes:
        left_out: why systems that were asked for are not in a group.
    """

    def __init__(self, benchmark: InferenceBenchmark, planner: Planner) -> None:
        self.benchmark, self.planner = benchmark, planner
        self.left_out: dict[str, str] = {}

    def groups(self) -> list[Group]:
        """What is timed against what."""
        groups = self._of_tasks() if self.benchmark.workload == "tasks" else self._of_shapes()
        return [group for group in groups if group.candidates]

    def _of_shapes(self) -> Iterable[Group]:
        """All systems in each precision; the precisions against each other; mixed batches."""
        benchmark = self.benchmark
        plans = tuple(self.planner.of_shape(*shape) for shape in benchmark.shapes)
        for precision in benchmark.precisions:
            names = self._available(precision)
            yield Group(precision, tuple(self._candidate(name, precision, plans) for name in names))
        if len(benchmark.precisions) > 1:
            pairs = [(name, precision) for precision in benchmark.precisions for name in self._available(precision)]
            few = [(name, precision) for name, precision in pairs if name in (BACKBONE, "spartan")]
            yield Group("precisions", tuple(self._candidate(*pair, plans[:1]) for pair in few))
        if benchmark.mixed:
            shape, precision = benchmark.shapes[0], benchmark.precisions[0]
            by_mode = {
                mode: self.planner.of_shape(*shape, mode=mode) for mode in ("single", "mixed", "all", "separate")
            }
            names = [name for name in self._available(precision, True) if name not in (BACKBONE, UNFUSED, *PEERS)]
            modes = dict.fromkeys(names, ("single", "mixed"))
            if ENGINE in names:
                modes[ENGINE_UPPER] = ("all", "separate")
            yield Group(
                "mixed",
                tuple(
                    self._candidate(name, precision, tuple(by_mode[mode] for mode in plan_modes), NUM_TASKS)
                    for name, plan_modes in modes.items()
                ),
            )

    def _of_tasks(self) -> Iterable[Group]:
        """All systems in all precisions at once, as the factors between them are wanted."""
        benchmark = self.benchmark
        for task in benchmark.tasks:
            plan = partial(self.planner.of_task, task, benchmark.data_dir, benchmark.max_inputs)
            plans = (plan(PADDED), plan(BY_TOKENS))
            yield Group(
                task,
                tuple(
                    self._candidate(name, precision, plans[1:] if name == ENGINE else plans)
                    for precision in benchmark.precisions
                    for name in self._available(precision)
                ),
            )

    def _candidate(self, system: str, precision: str, plans: tuple[Plan, ...], num_tasks: int = 1) -> Candidate:
        in_one_process = self.benchmark.one_process and system in SHARING and precision in UNQUANTIZED
        return Candidate(system, precision, plans, num_tasks, in_one_process)

    def _available(self, precision: str, several_tasks: bool = False) -> list[str]:
        """Systems that can be measured; notes why others cannot."""
        names = []
        for name in self.benchmark.chosen_systems:
            if name in PEERS and self.benchmark.emulate is not None:
                self.left_out[name] = "peers run on this machine only, not on an emulated device"
            elif name in PEERS and self.benchmark.peers_python is None:
                self.left_out[name] = "no Python with AdapterHub's adapters was given (peers_python)"
            elif export_format(precision) and name not in EXPORTED:
                self.left_out[f"{name} {precision}"] = "it is not exported"
            elif precision == "int8" and name not in QUANTIZED:
                self.left_out[f"{name} int8"] = "only plain linear layers are quantized, of the bare backbone"
            elif name == FULL and not several_tasks:
                if not self.benchmark.mixed:
                    self.left_out[name] = "with one task it is the backbone; it is measured in mixed batches"
            else:
                names.append(name)
        return names
