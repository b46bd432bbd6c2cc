"""Where a result comes from: versions, hardware, commit, and what else the machine was doing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("sparsepeft", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """Versions, hardware, commit and date, for a result file."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # what torch's own kernels use
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class OtherLoad:
    """How busy other processes keep the processors, from now on: timings taken beside them are worth little."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """The share, 0 to 1, of all processors' time that went to others; None where the system does not tell."""
        now = self._now()
        if now is None or self._start is None or now[1] <= self._start[1]:
            return None
        others, total = now[0] - self._start[0], now[1] - self._start[1]
        return min(1.0, max(0.0, others / total))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        ticks = cpu_ticks()
        if ticks is None:
            return None
        per_second = os.sysconf("SC_CLK_TCK")
        return (ticks[1] - ticks[0]) / per_second - time.process_time(), ticks[1] / per_second


def cpu_ticks() -> tuple[int, int] | None:
    """Ticks that all processors spent idle or waiting for a disk, and all ticks; None where there is no /proc/stat."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" if its tracked files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # else: somebody else's repository around us
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
