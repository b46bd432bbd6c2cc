"""Running the benchmark: processes that take turns."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.methods.recipes import get_recipe
from sparsepeft_research.benchmarks.inference.exported import export_system
from sparsepeft_research.benchmarks.inference.groups import Candidate, Group, Grouping
from sparsepeft_research.benchmarks.inference.report import Measured, describe
from sparsepeft_research.benchmarks.inference.systems import LOADING, MATRIX_PRODUCT, export_format, save_task
from sparsepeft_research.benchmarks.inference.workloads import (
    MAX_LENGTH,
    PADDED_BATCH,
    TOKEN_BUDGET,
    Model,
    Plan,
    Planner,
    count_flops,
    prepare_model,
)
from sparsepeft_research.benchmarks.measuring import sample_alternating, summarize
from sparsepeft_research.benchmarks.registry import Progress, silent
from sparsepeft_research.benchmarks.settings import ENGINE, ENGINE_UPPER, PEERS, InferenceBenchmark
from sparsepeft_research.benchmarks.workers import Worker

NUM_LOADED = 100
LATENCY_REPEATS = 10  # times as many for one short input, whose passes are short
_PRODUCT_SIZE = 2048
_WARM_UP = 1


def run(benchmark: InferenceBenchmark, progress: Progress = silent) -> dict[str, Any]:
    """Measure every system.

    Each is a process of its own with equal threads, unless they share one. All of a group are there at once and take
    turns, pass by pass.

    Args:
        benchmark: what to measure.
        progress: told what is being done.

    Returns:
        ``settings``, ``results`` (a plan of a group each), ``factors``, ``loading`` (None if not asked for),
        ``left_out`` with reasons, ``processes`` (what each process said of itself).

    Raises:
        UserError: the model or a task cannot be had.
        RunFailed: nothing could be measured, or a process ended while it was timed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress("preparing the model")
        model = prepare_model(benchmark.model, folder / "model", benchmark.seed)
        planner = Planner(model, folder, benchmark.seed)
        grouping = Grouping(benchmark, planner)
        groups = grouping.groups()
        session = _Session(benchmark, model, folder, progress)
        measured = [one for group in groups for one in session.measure(group)]
        text = planner.of_shape(*min(benchmark.shapes)).texts[0][0] if benchmark.mixed else ""
        loading = session.loading(text) if benchmark.mixed and session.task_folders else None
    left_out = grouping.left_out | session.left_out
    if not measured:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise RunFailed(f"Nothing could be measured ({reasons}); ask for other systems.")
    settings = asdict(benchmark)
    settings |= {
        "device": settings.pop("emulate"),  # what result files have always called it
        "systems": benchmark.chosen_systems,
        "model": model.name,
        "tokenizer": model.tokenizer,
        "architecture": model.architecture,
        "threads": benchmark.num_threads,
        "data_dir": None,
        "peers_python": None,
        "token_budget": TOKEN_BUDGET,
        "padded": {"length": MAX_LENGTH, "batch_size": PADDED_BATCH},
    }
    return {
        "settings": settings,
        **describe(measured),
        "loading": loading,
        "left_out": left_out,
        "processes": session.about,
    }


class _Session:
    """One run of the benchmark, with its files."""

    def __init__(self, benchmark: InferenceBenchmark, model: Model, folder: Path, progress: Progress) -> None:
        self.benchmark, self.model, self.folder, self.progress = benchmark, model, folder, progress
        self.left_out: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self.task_folders: dict[str, str] = {}
        self._exported: dict[tuple[str, str], dict[str, str | None]] = {}
        self._count = 0

    def measure(self, group: Group) -> list[Measured]:
        """Start the group's processes, and time them plan by plan; as often as the processes shall be started."""
        samples: dict[str, dict[str, list[float]]] = {}
        peaks: dict[str, int] = {}
        for _ in range(self.benchmark.starts):
            self._sample(group, samples, peaks)
        plans = {plan.name: plan for candidate in group.candidates for plan in candidate.plans}
        return [self._measured(group, plans[name], milliseconds, peaks) for name, milliseconds in samples.items()]

    def _sample(self, group: Group, samples: dict[str, dict[str, list[float]]], peaks: dict[str, int]) -> None:
        """Add milliseconds by plan and candidate, and each candidate's most bytes."""
        processes: dict[str, Worker] = {}
        workers: dict[str, Worker] = {}
        plans: dict[str, Plan] = {}
        runs: dict[str, list[Candidate]] = {}
        with ExitStack() as stack:
            for candidate in group.candidates:
                self.progress(f"{group.name}: starting {candidate.name}")
                try:
                    if candidate.process not in processes:
                        inside = [one for one in group.candidates if one.process == candidate.process]
                        processes[candidate.process] = stack.enter_context(self._start(inside))
                    worker = processes[candidate.process]
                    for plan in candidate.plans:  # a pass that fails shall not stop the others
                        worker.ask(f"pass {candidate.system} {plan.name}")
                except (RuntimeError, UserError) as error:
                    self.left_out[f"{candidate.name} ({group.name})"] = str(error)
                    continue
                workers[candidate.name] = worker
                self.about[candidate.name] = worker.ready
                for plan in candidate.plans:
                    plans[plan.name] = plan
                    runs.setdefault(plan.name, []).append(candidate)
            products = self._products(group, stack) if workers else {}
            for name, plan in plans.items():
                self.progress(f"{group.name}: timing {name}")
                word = "warm" if plan.is_latency else "pass"
                passes = {one.name: partial(workers[one.name].ask, f"{word} {one.system} {name}") for one in runs[name]}
                extra = {product: partial(worker.ask, f"pass {product}") for product, worker in products.items()}
                try:
                    milliseconds = sample_alternating(
                        passes | ({} if plan.is_latency else extra),
                        repeats=self.benchmark.repeats * (LATENCY_REPEATS if plan.is_latency else 1),
                        warm_up=_WARM_UP,
                        idle_wait_s=self.benchmark.idle_wait_s,
                        clock=lambda ask: float(ask()["ms"]),
                    )
                except RuntimeError as error:
                    raise RunFailed(f"{group.name}, {name}: {error}; start again, with fewer `systems`.") from error
                for who, values in milliseconds.items():
                    samples.setdefault(name, {}).setdefault(who, []).extend(values)
            for who in workers.keys() & processes.keys():  # not of those that share a process
                peaks[who] = max(peaks.get(who, 0), int(workers[who].ask("peak")["peak_bytes"]))

    def _measured(self, group: Group, plan: Plan, samples: dict[str, list[float]], peaks: dict[str, int]) -> Measured:
        sizes = self._product_sizes(group)
        timings = {name: summarize(values, _WARM_UP) for name, values in samples.items()}
        products = {name: timing for name, timing in timings.items() if name in sizes}
        return Measured(
            group=group.name,
            plan=plan.name,
            num_inputs=len(plan.texts),
            timings={name: timing for name, timing in timings.items() if name not in products},
            products=products,
            product_flops={name: 2 * math.prod(sizes[name]) for name in products},
            flops=count_flops(self.model.folder, len(plan.texts), plan.length or 0) if products else None,
            peak_bytes={name: peaks[name] for name in timings if name in peaks},
        )

    def _product_sizes(self, group: Group) -> dict[str, tuple[int, int, int]]:
        """Matrix products by which to know the machine, in a group of one precision: a large one, and the FFN's."""
        tokens = [size * length for size, length in self.benchmark.shapes if size > 1]
        inner = self.model.architecture["intermediate_size"]
        if group.name not in ("float32", "bfloat16") or not tokens or inner is None:
            return {}
        width = self.model.architecture["hidden_size"]
        sizes = ((_PRODUCT_SIZE, _PRODUCT_SIZE, _PRODUCT_SIZE), (max(tokens), width, inner))
        return {" x ".join(map(str, each)): each for each in sizes}

    def _products(self, group: Group, stack: ExitStack) -> dict[str, Worker]:
        plans = [{"name": name, "sizes": sizes} for name, sizes in self._product_sizes(group).items()]
        try:
            worker = stack.enter_context(self._process(MATRIX_PRODUCT, group.name, plans)) if plans else None
        except RuntimeError as error:
            self.left_out[f"{MATRIX_PRODUCT} {group.name}"] = str(error)
            worker = None
        return {} if worker is None else {str(plan["name"]): worker for plan in plans}

    def loading(self, text: str) -> dict[str, Any] | None:
        """Many tasks in one engine, in a process of its own."""
        if not Path("/proc/self/statm").exists():
            self.left_out[LOADING] = "this system does not say how much memory a process has"
            return None
        self.progress(f"loading {NUM_LOADED} tasks")
        settings = {"num_loaded": NUM_LOADED, "text": text}
        settings |= {"num_tasks": 2, "task_folder": self._task_folder(ENGINE)}
        try:
            with self._process(LOADING, self.benchmark.precisions[0], [], **settings) as worker:
                return worker.ready
        except RuntimeError as error:
            self.left_out[LOADING] = str(error)
            return None

    def _start(self, inside: Sequence[Candidate]) -> Worker:
        """A process for these candidates."""
        candidate = inside[0]
        plans = [
            {"name": f"{one.system} {plan.name}", "system": one.system, "mode": plan.mode, "tensors": plan.tensors}
            | ({"texts": plan.texts} if one.system in (ENGINE, ENGINE_UPPER) else {})
            for one in inside
            for plan in one.plans
        ]
        settings: dict[str, Any] = {"num_tasks": candidate.num_tasks}
        if candidate.system in PEERS:
            style = PEERS[candidate.system]
            settings |= {"style": style, "reduction_factor": get_recipe("paper", style).adapter["reduction_factor"]}
        if candidate.system in (ENGINE, ENGINE_UPPER):
            settings["task_folder"] = self._task_folder(candidate.system)
        if export_format(candidate.precision):
            settings |= self._files(candidate)
        return self._process(candidate.system, candidate.precision, plans, **settings)

    def _process(self, system: str, precision: str, plans: list[dict[str, Any]], **settings: Any) -> Worker:
        benchmark = self.benchmark
        shapes = benchmark.shapes if benchmark.workload == "fixed" else ()
        settings |= {
            "system": system,
            "precision": precision,
            "plans": plans,
            "model": self.model.folder,
            "threads": benchmark.num_threads,
            "device": benchmark.emulate,
            "seed": benchmark.seed,
            "token_budget": max(TOKEN_BUDGET, *(size * length for size, length in shapes), 1),
            "max_length": max([MAX_LENGTH, *(length for _, length in shapes)]),
        }
        self._count += 1
        if system in PEERS:
            command = [str(benchmark.peers_python), str(Path(__file__).parent / "processes" / "peer.py")]
        else:
            program = "exported" if export_format(precision) else "pytorch"
            command = [sys.executable, "-m", f"{__package__}.processes.{program}"]
        return Worker(command, settings, self.folder / f"process{self._count}.json")

    def _files(self, candidate: Candidate) -> dict[str, str | None]:
        """What a candidate runs outside PyTorch; written once."""
        key = (candidate.system, candidate.precision)
        if key not in self._exported:
            self.progress(f"exporting {candidate.name}")
            folder = self.folder / f"{candidate.precision}-{candidate.system}"
            self._exported[key] = export_system(candidate.system, self.model.folder, folder, candidate.precision)
        return self._exported[key]

    def _task_folder(self, system: str) -> str:
        """The folder of a SPARTAN task in all layers, or in the upper third of them."""
        if system not in self.task_folders:
            num_layers = self.model.architecture["num_hidden_layers"]
            upper = range(num_layers - max(1, num_layers // 3), num_layers)
            layers = upper if system == ENGINE_UPPER else None
            self.task_folders[system] = str(save_task(self.model.folder, self.folder / system, layers))
        return self.task_folders[system]
