"""Timing candidates against each other on a machine that does other things too, their memory, and their answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsepeft.provenance import cpu_ticks


class Timing(NamedTuple):
    """Latency of one candidate over its repeats."""

    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    minimum_ms: float
    repeats: int
    warm_up: int


def time_alternating(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 2,
    idle_wait_s: float = 0.0,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time callables in turn; see :func:`sample_alternating`.

    On the device "cuda" it is the GPU's time, with cold caches.
    """
    clock = _gpu_clock() if device == "cuda" else _cpu_latency_ms
    samples = sample_alternating(candidates, repeats=repeats, warm_up=warm_up, idle_wait_s=idle_wait_s, clock=clock)
    return {name: summarize(values, warm_up) for name, values in samples.items()}


def sample_alternating(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int,
    idle_wait_s: float,
    clock: Callable[[Callable[[], Any]], float],
) -> dict[str, list[float]]:
    """Time callables in turn, A B C, B C A, ..., so that a disturbance of the machine meets all of them alike.

    Each round starts when the machine is idle, or after ``idle_wait_s``. Threads are the caller's: set them once with
    ``torch.set_num_threads`` before. ``clock`` calls a candidate and returns milliseconds.
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
            samples[name].append(clock(candidates[name]))
    return samples


def summarize(values: Sequence[float], warm_up: int) -> Timing:
    """The median and quartiles of a candidate's times."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, min(values), len(values), warm_up)


def wait_until_idle(timeout_s: float, *, max_busy: float = 0.1, window_s: float = 0.2) -> bool:
    """Wait until the CPUs were at most ``max_busy`` in use for a moment; return whether they were.

    Does nothing where the system does not tell.
    """
    if timeout_s <= 0:
        return False
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        before = cpu_ticks()
        time.sleep(window_s)
        now = cpu_ticks()
        if before is None or now is None:
            return False
        idle, total = now[0] - before[0], now[1] - before[1]
        if total > 0 and idle >= (1 - max_busy) * total:
            return True
    return False


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of tensors alive at one time that were made while ``function`` ran.

    On a CPU these are the events of torch's allocator, exact and not disturbed by what the machine does besides; what a
    kernel takes from elsewhere for its own use is not among them. On "cuda" it is the allocator's peak above what was
    allocated before.

    Args:
        function: is run once.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return memory_by_phase(function)[""].peak_bytes


class Phase(NamedTuple):
    """Bytes of the tensors made since a function began: when a phase of it begins, and the most in the phase."""

    start_bytes: int
    peak_bytes: int


def memory_by_phase(function: Callable[[], object], marks: Sequence[str] = ()) -> dict[str, Phase]:
    """The memory of a function on the CPU, see :func:`peak_bytes`, in each of its phases.

    Args:
        function: is run once.
        marks: names of ``torch.profiler.record_function`` that begin a phase; before the first it is called "".
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result  # after the profile: what is returned is alive to the end
    phases, name, alive = {"": Phase(0, 0)}, "", 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() in ("[memory]", *marks)]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() != "[memory]":
            name = event.name()
            phases[name] = Phase(alive, alive)
            continue
        alive += event.nbytes()
        phases[name] = phases[name]._replace(peak_bytes=max(phases[name].peak_bytes, alive))
    return phases


def require_agreement(name: str, actual: Iterable[Tensor], expected: Iterable[Tensor], *, tolerance: float) -> float:
    """Return the largest error relative to the largest expected entry of its tensor.

    Raises:
        RuntimeError: the error exceeds ``tolerance`` (or is NaN), so a speed would mean nothing.
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


def forward_backward(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """Return the output of ``function`` and its gradients with respect to all ``tensors``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def as_dicts(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """As result files have them."""
    return {name: timing._asdict() for name, timing in timings.items()}


def _cpu_latency_ms(candidate: Callable[[], object]) -> float:
    start = time.perf_counter()
    candidate()
    return 1e3 * (time.perf_counter() - start)


def _gpu_clock() -> Callable[[Callable[[], object]], float]:
    """Return a function that times a call by the GPU's own clock."""
    larger_than_caches = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def latency_ms(candidate: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        larger_than_caches.zero_()  # empties them, and is still at it when the candidate's first kernel is launched
        start.record()
        candidate()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return latency_ms
