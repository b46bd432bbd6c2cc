"""Memory as counted by the allocator: exact, and not disturbed by what the machine does besides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of tensors alive at one time that were made while ``function`` ran.

    On a CPU these are the events of torch's allocator; what a kernel takes from elsewhere for its own use is not among
    them. On "cuda" it is the allocator's peak above what was allocated before.

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result  # after the profile: what is returned is alive to the end
    alive = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
