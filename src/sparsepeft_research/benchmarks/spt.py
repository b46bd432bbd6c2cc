"""What sparse attention and routed FFNs save of a LoRA fine-tuning step, in time and memory."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsepeft.spt import SptConfig, sparsification
from sparsepeft_research.benchmarks.measuring import peak_bytes, time_alternating
from sparsepeft_research.benchmarks.registry import Progress, silent
from sparsepeft_research.benchmarks.settings import SptBenchmark
from sparsepeft_research.benchmarks.stacks import STACKS, Stack, stack_config

BASELINE, EAGER, CHECKPOINTING, COMPILED = "sdpa", "eager", "sdpa, checkpointing", "sdpa, compiled"
PLAN = "plan"
_EAGER_SHARE = 1 / 3  # of the machine's memory that attention matrices may take


def candidates(benchmark: SptBenchmark, length: int) -> dict[str, dict[str, Any]]:
    """What is compared at a length: arguments of :class:`Stack`, by name, the baseline first."""
    by_name: dict[str, dict[str, Any]] = {BASELINE: {}, CHECKPOINTING: {"checkpointing": True}}
    if benchmark.compile:
        by_name[COMPILED] = {"compiled": True}
    by_name[EAGER] = {"attention": "eager"}
    by_name["sparse attention"] = {"spt": benchmark.spt(length)}
    for values in benchmark.values:
        for active in benchmark.active_blocks:
            both, ffn = (benchmark.spt(length, attention=a, active=active, values=values) for a in (True, False))
            share = f"{both.num_active_blocks}/{both.num_blocks} {values}"
            by_name |= {f"FFN {share}": {"spt": ffn}, f"both {share}": {"spt": both}}
    if (planned := benchmark.planned()) is not None:
        by_name[PLAN] = {"spt": planned}
    return by_name


def run(benchmark: SptBenchmark, progress: Progress = silent) -> dict[str, Any]:
    """Measure a fine-tuning step of every candidate at every length.

    Times are of whole steps (forward, backward, AdamW), in turn, after warm-up. The split by module and the step with
    which codebooks are refreshed are separate runs of one step each. Peak bytes are what a step allocates above
    weights and optimizer state, see :func:`sparsepeft_research.benchmarks.measuring.peak_bytes`.

    Args:
        benchmark: what to measure.
        progress: told what is being done.

    Returns:
        ``settings`` and ``results``, of which each has a length's ``candidates`` and what was ``left_out``, and why.

    Raises:
        UserError: the model cannot be measured.
    """
    config = stack_config(benchmark.model, benchmark.layers, max(benchmark.lengths))
    results = [_at_length(benchmark, config, length, progress) for length in benchmark.lengths]
    settings = {
        **asdict(benchmark),
        **{name: Path(getattr(benchmark, name)).name for name in ("model", "plan")},
        "is_random": benchmark.model in STACKS,
        "hidden_size": config.hidden_size,
        "model_type": config.model_type,
    }
    return {"settings": settings, "results": results}


def _at_length(benchmark: SptBenchmark, config: Any, length: int, progress: Progress) -> dict[str, Any]:
    compared, left_out = candidates(benchmark, length), {}
    needed = _eager_bytes(benchmark, config, length)
    if needed > _EAGER_SHARE * _memory_bytes(benchmark.device):
        del compared[EAGER]
        left_out[EAGER] = f"its attention matrices would take about {needed / 2**30:.0f} GiB"
    stacks = {}
    for name, arguments in compared.items():
        progress(f"{length} tokens: making {name}")
        stacks[name] = Stack(benchmark, config, length, **arguments)
    progress(f"{length} tokens: timing {len(stacks)} candidates, {benchmark.repeats} steps each")
    how: dict[str, Any] = {
        "repeats": benchmark.repeats,
        "warm_up": benchmark.warm_up,
        "idle_wait_s": benchmark.idle_wait_s,
    }
    timings = time_alternating({n: stack.step for n, stack in stacks.items()}, device=benchmark.device, **how)
    progress(f"{length} tokens: memory and split")
    peaks = {name: peak_bytes(stack.step, benchmark.device) for name, stack in stacks.items()}
    sparse = sparsification(stacks["sparse attention"].model)
    attention_names = list(sparse.attention) if sparse else []
    described_candidates = {}
    for name, stack in stacks.items():
        described: dict[str, Any] = {"step": timings[name]._asdict(), "peak_bytes": peaks[name]}
        if name not in (CHECKPOINTING, COMPILED):  # they run layers twice, or not as modules
            described["split_ms"] = stack.split(attention_names)
        sparse = sparsification(stack.model)
        if sparse is not None and any(layer.state.current.codebooks.numel() for layer in sparse.attention.values()):
            described["codebook_refresh"] = _refresh(stack, sparse.config, timings[name].median_ms, benchmark)
        described |= _ratios(name, timings, peaks)
        described_candidates[name] = described
    del stacks
    gc.collect()
    return {"length": length, "candidates": described_candidates, "left_out": left_out}


def _ratios(name: str, timings: dict[str, Any], peaks: dict[str, int]) -> dict[str, dict[str, float]]:
    against = [other for other in (BASELINE, EAGER, CHECKPOINTING, COMPILED) if other in timings and other != name]
    return {
        "speedup_over": {other: timings[other].median_ms / timings[name].median_ms for other in against},
        "peak_of": {other: peaks[name] / peaks[other] for other in against},
    }


def _refresh(stack: Stack, config: SptConfig, step_ms: float, benchmark: SptBenchmark) -> dict[str, float]:
    """What new codebooks cost: every ``codebook_interval`` steps, so that much less in the mean."""
    once = time_alternating({"": partial(stack.step, refresh=True)}, repeats=2, warm_up=0, device=benchmark.device)
    extra_ms = once[""].minimum_ms - step_ms
    return {"extra_ms": extra_ms, "every_steps": config.codebook_interval}


def _eager_bytes(benchmark: SptBenchmark, config: Any, length: int) -> int:
    """About what eager attention keeps: probabilities in float32 and, in other dtypes, once more; scores on top."""
    matrix = 4 * benchmark.batch_size * config.num_attention_heads * length**2
    return matrix * (2 * benchmark.layers + 3)


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
