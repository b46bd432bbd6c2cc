"""What the compiled kernels are worth on a kind of processor, in one run, against what was aimed at.

    python benchmarks/bench_processors.py --output benchmarks/results/processors_native.json
    python benchmarks/bench_processors.py --processor avx2 --output benchmarks/results/processors_avx2.json

``avx2`` keeps everything, the kernels, PyTorch, MKL and oneDNN, to what a processor without AVX-512 has. Measured are
one memory read of several sizes, RoBERTa-base with and without memories, sparse attention against SDPA, and a step of
the OPT-like stack: the cases of the other benchmarks, whose documentation says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bench_memory
import bench_sparse_attention
from _common import describe_environment, require_agreement, time_alternating, write_json
from sparsepeft.ops import explain_memory_impl
from sparsepeft_research.benchmarks.inference import InferenceBenchmark, run_inference_benchmark
from sparsepeft_research.benchmarks.spt import BASELINE, SptBenchmark, run_spt_benchmark

LIMITS = {
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
    memory = [torch.randn(*shape, HIDDEN_SIZE, generator=generator) * 0.02 for shape in shapes]
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
        readers = {name: partial(bench_memory.reader(name), x, *memory, top_k=top_k) for name in FORMS}
        with torch.no_grad():
            expected = bench_memory.reader("reference")(x[:64], *memory, top_k=top_k)
            errors = {
                name: require_agreement(name, [read()[:64]], [expected], tolerance=bench_memory.TOLERANCE)
                for name, read in readers.items()
            }
            # A call of microseconds is repeated until milliseconds are timed.
            calls = {name: partial(_often, read, max(1, 1024 // num_tokens)) for name, read in readers.items()}
            timings = time_alternating(calls, repeats=repeats, warm_up=2, idle_wait_s=idle_wait_s)
        choice = explain_memory_impl(
            num_parents=parents, num_children=children, top_k=top_k, inference=True,
            num_tokens=num_tokens, hidden_size=HIDDEN_SIZE,
        )  # fmt: skip
        results[str(num_tokens)] = {
            "calls_per_timing": max(1, 1024 // num_tokens),
            "timings": {name: timing._asdict() for name, timing in timings.items()},
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
    found = [times[n]["auto"]["median_ms"] / times[n]["masked"]["median_ms"] for n in NUM_TOKENS]
    plans = {each["plan"]: each["candidates"]["spartan float32"] for each in report["inference"]["results"]}
    speeds = [plan["speed_over"]["backbone float32"] for plan in plans.values()]
    found += [speeds[0], 1 / speeds[1]]
    found += [report["sparse_attention"]["speedup_over_sdpa"][name] for name in ("token", "block")]
    stack = report["spt_stack"]["results"][0]["candidates"]
    found += [stack[name]["speedup_over"][BASELINE] for name in ("both 4/8", "both 2/8")]
    return dict(zip(TARGETS, found, strict=True))


def main() -> None:
    """Measure, print each target with what was measured, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--processor", choices=tuple(LIMITS), default="native", help="kind of processor to be kept to")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each candidate")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument("--idle-wait", type=float, default=0.0, help="seconds to wait for an idle machine each round")
    arguments = parser.parse_args()
    limits = LIMITS[arguments.processor]
    if any(os.environ.get(name) != value for name, value in limits.items()):  # they count from the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **limits})
    torch.set_num_threads(arguments.threads)

    environment = describe_environment(seed=0)
    repeats, idle = arguments.repeats, arguments.idle_wait
    case = bench_sparse_attention.Case(4096, 16, 16, 64, 512, True)
    inference = InferenceBenchmark(
        systems=("backbone", "spartan"), precisions=("float32",), threads=arguments.threads, repeats=repeats,
        one_process=True, idle_wait_s=idle,
    )  # fmt: skip
    stack = SptBenchmark(lengths=(2048,), repeats=max(5, repeats // 2), idle_wait_s=idle)
    say = partial(print, flush=True)
    report = {
        "processor": arguments.processor,
        "limits": limits,
        "memory_read": memory_reads(repeats, idle),
        "inference": run_inference_benchmark(inference, progress=say),
        "sparse_attention": bench_sparse_attention.run(case, max(5, repeats // 2), 0, idle, "cpu"),
        "spt_stack": run_spt_benchmark(stack, progress=say),
        "environment": environment,
    }
    report["against_targets"] = [
        {"figure": name, "measured": value, "aim": list(TARGETS[name]),
         "met": value <= TARGETS[name][1] if TARGETS[name][0] == "at most" else value >= TARGETS[name][1]}
        for name, value in ratios(report).items()
    ]  # fmt: skip
    for each in report["against_targets"]:
        say(f"{each['figure']}: {each['measured']:.3f} (aim: {' '.join(map(str, each['aim']))})")
    write_json(arguments.output, report)


if __name__ == "__main__":
    main()
