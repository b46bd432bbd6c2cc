"""One of this package's systems, and many tasks in one engine: the memory they take, how fast one replaces another.

python -m sparsepeft_research.benchmarks.inference.processes.pytorch SETTINGS.json
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsepeft_research.benchmarks.devices import emulate
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, resident_bytes, serve
from sparsepeft_research.benchmarks.inference.systems import LOADING, build_engine, prepare_system

_REPEATS = 21


def prepare(settings: dict[str, Any]) -> tuple[Mapping[str, Pass], dict[str, Any]]:
    """Limit this process to the device, then build the system."""
    torch.set_num_threads(settings["threads"])
    about: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if settings["device"] is not None:
        about["emulation"] = dataclasses.asdict(emulate(settings["device"]))
    if settings["system"] == LOADING:
        return {}, about | measure_loading(settings)
    return prepare_system(settings), about


def measure_loading(settings: dict[str, Any]) -> dict[str, Any]:
    """Load ``num_loaded`` tasks into a fresh engine.

    Returns:
        ``file_bytes`` of their weights, ``resident_bytes`` by which this process grew, their ratio; medians in
        milliseconds: of a call (``call_ms``), of how much longer it takes when the call before asked for another task
        (``switch_ms``), of putting a task that has been read in another's place (``swap_ms``), of that with reading
        and with deleting the former one (``replace_ms``).
    """
    engine = build_engine(settings)
    folder, number = Path(settings["task_folder"]), settings["num_loaded"]
    first, second = list(engine.tasks)[:2]
    text = settings["text"]

    def ask(task: str) -> None:
        engine.predict([(task, text)], on_error="raise")

    ask(first)
    before = resident_bytes()
    for i in range(number):
        engine.add(f"loaded{i}", folder)
    grown = resident_bytes() - before
    files = number * (folder / "adapter_model.safetensors").stat().st_size
    same, other = [], []
    for _ in range(_REPEATS):
        for task in (first, second):
            other.append(_milliseconds(partial(ask, task)))
            same.append(_milliseconds(partial(ask, task)))
    swaps, replacements = [], []
    for _ in range(_REPEATS):
        replacements.append(_milliseconds(lambda: engine.replace(second, folder)))
        loaded = engine._load(folder)  # what replace() does, in its two parts
        with engine._tasks.in_use():  # the former version is deleted when the calls that use it have ended
            swaps.append(_milliseconds(lambda loaded=loaded: engine._tasks.replace(second, lambda: loaded)))  # type: ignore[misc]
    return {
        "num_loaded": number,
        "file_bytes": files,
        "resident_bytes": grown,
        "resident_over_files": grown / files,
        "call_ms": statistics.median(same),
        "switch_ms": statistics.median(other) - statistics.median(same),
        "swap_ms": statistics.median(swaps),
        "replace_ms": statistics.median(replacements),
    }


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    serve(prepare)
