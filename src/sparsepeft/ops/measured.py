"""Which of several forms of an operator is fastest here: measured once per machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from sparsepeft.folders import write_json
from sparsepeft.ops.native import cache_folder, machine

_ROUNDS = 5


def fastest(name: str, key: tuple[object, ...], forms: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the milliseconds of each form, the fastest first.

    They are measured where this machine, this build of the kernels and this number of threads have not met ``key``
    before: each form is called once to warm up and five times in turn, which takes milliseconds; its best time counts,
    as whatever else runs can only add to it.

    Args:
        name: the operator.
        key: what the times depend on beside the machine: sizes, dtype.
        forms: calls to compare, by name.
    """
    identity = (machine(), torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    digest = hashlib.sha256(repr((identity, key, sorted(forms))).encode()).hexdigest()[:16]
    path = cache_folder() / "measured" / f"{name}-{digest}.json"
    times = _read(path, forms)
    if times is None:
        times = {name: min(each) for name, each in alternately(forms, _ROUNDS).items()}
        content = {"name": name, "key": repr(key), "threads": torch.get_num_threads(), "milliseconds": times}
        with suppress(OSError):  # a cache folder that cannot be written only means measuring again next time
            write_json(path, content)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def alternately(forms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each form, in each round; all are called once before, to warm up."""
    for call in forms.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, call in forms.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _read(path: Path, forms: Mapping[str, object]) -> dict[str, float] | None:
    try:
        times = json.loads(path.read_text())["milliseconds"]
        return {name: float(times[name]) for name in forms}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours: measured anew
        return None
