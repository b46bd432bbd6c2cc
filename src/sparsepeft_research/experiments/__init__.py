"""Experiments behind the documentation: ``python -m sparsepeft_research.experiments.NAME --help``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsepeft.folders import write_json


def run_once(file: Path, measure: Callable[[], dict[str, Any]], about: dict[str, Any] | None = None) -> None:
    """Write what ``measure`` returns to ``file``, unless that is there, or another process is at it.

    Args:
        file: the result file.
        measure: does the run.
        about: put beside the result as ``experiment``, with the seconds that it took.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0):
            if file.exists():
                return
            start = time.perf_counter()
            result = measure()
            seconds = round(time.perf_counter() - start, 1)
            write_json(file, result if about is None else {"experiment": about | {"seconds": seconds}, **result})
            print(f"{file.stem:<44} {result.get('score', '')}  {seconds:.0f} s", flush=True)
    except Timeout:
        return
