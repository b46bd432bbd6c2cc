"""What every benchmark shares: alternating timing, a description of the machine, a check before speed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sparsepeft.folders import write_json
from sparsepeft.provenance import environment
from sparsepeft_research.benchmarks import Timing, time_alternating, wait_until_idle

__all__ = [
    "Timing",
    "describe_environment",
    "require_agreement",
    "time_alternating",
    "wait_until_idle",
    "write_json",
]


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
    return {**environment(), "load_average": os.getloadavg()[0], "seed": seed}
