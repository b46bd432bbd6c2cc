"""What the compiled kernels are worth on a kind of processor, in one run, against what was aimed at.

    sparsepeft benchmark processors --output processors_native.json
    sparsepeft benchmark processors --processor avx2 --output processors_avx2.json

``avx2`` keeps everything, the kernels, PyTorch, MKL and oneDNN, to what a processor without AVX-512 has. Measured are
one memory read of several sizes, RoBERTa-base with and without memories, sparse attention against SDPA, and a step of
the OPT-like stack: the cases of the other benchmarks, whose documentation says more.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from sparsepeft.ops import explain, memory_read
from sparsepeft_research.benchmarks import memory, sparse_attention
from sparsepeft_research.benchmarks.measuring import as_dicts, require_agreement, time_alternating
from sparsepeft_research.benchmarks.registry import Progress, run_benchmark
from sparsepeft_research.benchmarks.spt import BASELINE

LIMITS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "SPARSEPEFT_CPU": "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
# P, C, K and D of the paper; the numbers of tokens that are read at once.
MEMORY, HIDDEN_SIZE, NUM_TOKENS = (16, 3, 8), 768, (1, 32, 512, 4096)
FORMS = ("masked", "cpu", "auto")
TARGETS = {
    **{f"memory_read, {n} tokens: time of auto over masked": ("at most", 1.0) for n in NUM_TOKENS},
    "RoBERTa-base 32 x 128: speed with SPARTAN over without": ("at least", 0.975),
    "RoBERTa-base 1 x 32: latency with SPARTAN over without": ("at most", 1.05),
    "sparse attention by token, 4,096 tokens: speed over SDPA": ("at least", 1.5),
    "sparse attention by block, 4,096 tokens: speed over SDPA": ("at least", 3.0),
    "SPT stack, 2,048 tokens, half of the FFNs: speed over dense": ("at least", 1.3),
    "SPT stack, 2,048 tokens, a quarter of the FFNs: speed over dense": ("at least", 1.7),
}


def memory_reads(repeats: int, idle_wait_s: float) -> dict[str, Any]:
    """Time a read without gradients, verified first, by number of tokens."""
    parents, children, top_k = MEMORY
    generator, results = torch.Generator().manual_seed(0), {}
    shapes = ((parents,), (parents, children), (parents, children))
    tensors = [torch.randn(*shape, HIDDEN_SIZE, generator=generator) * 0.02 for shape in shapes]
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
        readers = {name: partial(memory.reader(name), x, *tensors, top_k=top_k) for name in FORMS}
        with torch.no_grad():
            expected = memory.reader("reference")(x[:64], *tensors, top_k=top_k)
            errors = {
                name: require_agreement(name, [read()[:64]], [expected], tolerance=memory.TOLERANCE)
                for name, read in readers.items()
            }
            # A call of microseconds is repeated until milliseconds are timed.
            calls = {name: partial(_often, read, max(1, 1024 // num_tokens)) for name, read in readers.items()}
            timings = time_alternating(calls, repeats=repeats, warm_up=2, idle_wait_s=idle_wait_s)
        choice = explain(memory_read, x, *tensors, top_k=top_k)
        results[str(num_tokens)] = {
            "calls_per_timing": max(1, 1024 // num_tokens),
            "timings": as_dicts(timings),
            "largest_relative_error": errors,
            "chosen": choice.impl,
            "reason": choice.reason,
        }
    return results


def _often(call: Any, times: int) -> None:
    for _ in range(times):
        call()


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """What ``TARGETS`` judges, by the same names."""
    times = {n: report["memory_read"][str(n)]["timings"] for n in NUM_TOKENS}
    measured = [times[n]["auto"]["median_ms"] / times[n]["masked"]["median_ms"] for n in NUM_TOKENS]
    plans = {each["plan"]: each["candidates"]["spartan float32"] for each in report["inference"]["results"]}
    speeds = [plan["speed_over"]["backbone float32"] for plan in plans.values()]
    measured += [speeds[0], 1 / speeds[1]]
    measured += [report["sparse_attention"]["speedup_over_sdpa"][name] for name in ("token", "block")]
    stack = report["spt_stack"]["results"][0]["candidates"]
    measured += [stack[name]["speedup_over"][BASELINE] for name in ("both 4/8 routed", "both 2/8 routed")]
    return dict(zip(TARGETS, measured, strict=True))


def run(*, processor: str, repeats: int, idle_wait: float, progress: Progress) -> dict[str, Any]:
    """Measure in a process that is kept to the processor's instructions; they count from its start."""
    limits = LIMITS[processor]
    os.environ |= limits
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        progress("measuring in a process of its own")
        report = pool.submit(measure, repeats, idle_wait, torch.get_num_threads()).result()
    judged: list[dict[str, Any]] = []
    for name, value in ratios(report).items():
        bound, aim = TARGETS[name]
        met = value <= aim if bound == "at most" else value >= aim
        judged.append({"figure": name, "measured": value, "aim": [bound, aim], "met": met})
        progress(f"{name}: {value:.3f} (aim: {bound} {aim})")
    return {"results": {"against_targets": judged, **report}, "settings": {"limits": limits}}


def measure(repeats: int, idle_wait: float, threads: int) -> dict[str, Any]:
    """The cases of the other benchmarks, in this process."""
    torch.set_num_threads(threads)
    few = max(5, repeats // 2)
    attention = sparse_attention.Case(4096, 16, 16, 64, 512, True)
    inference = run_benchmark(
        "inference",
        systems=("backbone", "spartan"),
        precisions=("float32",),
        threads=threads,
        repeats=repeats,
        one_process=True,
        idle_wait_s=idle_wait,
    )
    return {
        "memory_read": memory_reads(repeats, idle_wait),
        "inference": inference.to_dict(),
        "sparse_attention": sparse_attention.measure(attention, few, 0, idle_wait, "cpu"),
        "spt_stack": run_benchmark(
            "spt", lengths=(2048,), values=("routed",), repeats=few, idle_wait_s=idle_wait
        ).to_dict(),
    }
