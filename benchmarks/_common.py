"""What every benchmark shares: alternating timing, a description of the machine, a check before speed, atomic JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Timing(NamedTuple):
    """Latency of one candidate over its repeats."""

    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    minimum_ms: float
    repeats: int
    warm_up: int


def time_alternating(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 2, idle_wait_s: float = 0.0
) -> dict[str, Timing]:
    """Time callables in turn, A B C, B C A, ..., so that a disturbance of the machine meets all of them alike.

    Each round starts when the machine is idle, or after ``idle_wait_s``. Threads are the caller's: set them once with
    ``torch.set_num_threads`` before.
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; quartiles need at least 2.")
    for candidate in candidates.values():
        for _ in range(warm_up):
            candidate()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for repeat in range(repeats):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]  # nobody is always the first
        if wait_until_idle(idle_wait_s):
            candidates[order[-1]]()  # threads and caches went to sleep; its own turn is the furthest away
        for name in order:
            candidate = candidates[name]
            start = time.perf_counter()
            candidate()
            samples[name].append(1e3 * (time.perf_counter() - start))
    timings = {}
    for name, values in samples.items():
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, first, third, min(values), repeats, warm_up)
    return timings


def wait_until_idle(timeout_s: float, *, max_busy: float = 0.1, window_s: float = 0.2) -> bool:
    """Wait until the CPUs were at most ``max_busy`` in use for a moment; return whether they were.

    Does nothing where ``/proc/stat`` is missing.
    """
    if timeout_s <= 0 or not Path("/proc/stat").exists():
        return False
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        idle_before, total_before = _cpu_ticks()
        time.sleep(window_s)
        idle, total = _cpu_ticks()
        if total > total_before and idle - idle_before >= (1 - max_busy) * (total - total_before):
            return True
    return False


def require_agreement(name: str, actual: Iterable[Tensor], expected: Iterable[Tensor], *, tolerance: float) -> float:
    """Return the largest error relative to the largest expected entry; raise where it exceeds ``tolerance``.

    Raises:
        RuntimeError: the candidate is wrong (or NaN), so its speed would mean nothing.
    """
    worst = 0.0
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"{name} differs from the reference by {error:.1e} in tensor {index}, more than {tolerance:.0e}: "
                "no speed is reported for a wrong result."
            )
        worst = max(worst, error)
    return worst


def describe_environment(*, seed: int) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a measurement."""
    commit = _git("rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "peft")},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "seed": seed,
    }


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            json.dump(content, file, indent=2)
            file.write("\n")
        except BaseException:
            temporary.unlink()
            raise
    temporary.chmod(0o644)  # temporary files are private
    temporary.replace(path)


def _cpu_ticks() -> tuple[int, int]:
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)  # idle and waiting for a disk, against everything


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an unpacked archive
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
