"""A LoRA fine-tuning step of four OPT-like layers, dense against sparse, against what was aimed at.

    python benchmarks/bench_spt_stack.py --output benchmarks/results/spt_stack.json

Hidden size 1024, LoRA of rank 16 on queries and values, L = n/8 by block, 4 and 2 of 8 blocks of the FFNs, batch 1:
the step is that of ``sparsepeft benchmark spt``. How sparse attention by itself grows with the length at a fixed L, and
what of it is comparing codes, is in ``bench_sparse_attention.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from _common import describe_environment, write_json
from sparsepeft_research.benchmarks.spt import BASELINE, EAGER, SptBenchmark, run_spt_benchmark

# By length: speed-up over SDPA with dense FFNs, peak bytes over its, and over those of eager attention.
TARGETS: dict[int, dict[str, dict[str, float]]] = {
    2048: {
        "both 4/8": {"speedup": 1.4, "peak_of_sdpa": 0.75, "peak_of_eager": 0.5},
        "both 2/8": {"speedup": 1.8, "peak_of_sdpa": 0.68, "peak_of_eager": 0.5},
    },
    8192: {"both 4/8": {"speedup": 1.7}, "both 2/8": {"speedup": 2.2}},
}


def against_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at for a length, what was measured, and whether that is enough."""
    judged = []
    for name, wanted in TARGETS.get(result["length"], {}).items():
        found = result["candidates"][name]
        measured = {
            "speedup": found["speedup_over"][BASELINE],
            "peak_of_sdpa": found["peak_of"][BASELINE],
            "peak_of_eager": found["peak_of"].get(EAGER),
        }
        for kind, target in wanted.items():
            value = measured[kind]
            met = None if value is None else value >= target if kind == "speedup" else value <= target
            judged.append({"candidate": name, "kind": kind, "target": target, "measured": value, "met": met})
    return judged


def main() -> None:
    """Measure, print each target with what was measured, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each candidate")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument("--idle-wait", type=float, default=0.0, help="seconds to wait for an idle machine each round")
    parser.add_argument("--quick", action="store_true", help="one layer and 256 tokens, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    shape = {"layers": 1, "lengths": (256,)} if arguments.quick else {"lengths": tuple(arguments.lengths)}
    benchmark = SptBenchmark(repeats=arguments.repeats, idle_wait_s=arguments.idle_wait, **shape)
    environment = describe_environment(seed=benchmark.seed)  # before: the load is that of others
    report = run_spt_benchmark(benchmark, progress=lambda message: print(message, flush=True))
    for result in report["results"]:
        result["targets"] = against_targets(result)
        for each in result["targets"]:
            value = "not measured" if each["measured"] is None else f"{each['measured']:.2f}"
            print(f"{result['length']} tokens, {each['candidate']}: {each['kind']} {value} (aim: {each['target']})")
    write_json(arguments.output, {**report, "environment": environment})


if __name__ == "__main__":
    main()
