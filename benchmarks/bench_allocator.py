"""What reusing freed memory gives: ``sparsepeft.devices.keep_freed_memory`` against the allocator as it is.

    python benchmarks/bench_allocator.py --output benchmarks/results/allocator.json [--language-model FOLDER]

Inference and training passes, each in two processes that take turns: one as PyTorch users run it, one that keeps what
tensors free. Random weights and tokens. Peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _common import describe_environment, time_alternating, write_json
from sparsepeft.backbones import resolve_model
from sparsepeft_research.benchmarks.inference.workloads import prepare_model
from sparsepeft_research.benchmarks.workers import Worker

WORKER = Path(__file__).with_name("_allocator_worker.py")
ROBERTA, MINILM, LANGUAGE_MODEL = "roberta-base", "minilm", "language model"
# Kind, model, precision, shape.
CASES = (
    ("inference", ROBERTA, "float32", (32, 128)),
    ("inference", ROBERTA, "float32, oneDNN", (32, 128)),
    ("inference", ROBERTA, "bfloat16", (32, 128)),
    ("inference", ROBERTA, "bfloat16", (32, 32)),
    ("training", ROBERTA, "float32", (16, 128)),
    ("training", ROBERTA, "bfloat16", (16, 128)),
    ("training", MINILM, "bfloat16", (16, 128)),
    ("training", LANGUAGE_MODEL, "float32", (8, 512)),
)


def main() -> None:
    """Measure all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--language-model", help="hub id or folder of a causal model; its case is left out without one")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--idle-wait", type=float, default=0.0, help="seconds to wait for an idle machine per round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    environment = describe_environment(seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        roberta = prepare_model(ROBERTA, Path(folder), options.seed).folder
        models = {ROBERTA: roberta, MINILM: resolve_model(None), LANGUAGE_MODEL: options.language_model}
        results = [
            measure(kind, name, models[name], precision, shape, options)
            for kind, name, precision, shape in CASES
            if models[name] is not None
        ]
    write_json(options.output, {"threads": options.threads, "results": results, "environment": environment})


def measure(
    kind: str, name: str, model: str, precision: str, shape: tuple[int, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Both processes of one case."""
    method = None if kind == "inference" else "lora" if name == LANGUAGE_MODEL else "spartan"
    settings = {"kind": kind, "model": model, "precision": precision, "shape": shape, "method": method}
    settings |= {"seed": options.seed, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:

        def start(keep: bool) -> Worker:
            path = Path(folder) / f"{keep}.json"
            path.write_text(json.dumps(settings | {"keep": keep}))
            command = [sys.executable, str(WORKER), str(path)]
            return Worker(command, options.threads, path.with_suffix(".log"))

        with start(False) as plain, start(True) as kept:
            asked = {"as it is": partial(plain.ask, "pass pass"), "kept": partial(kept.ask, "pass pass")}
            timings = time_alternating(asked, repeats=options.repeats, idle_wait_s=options.idle_wait)
            peaks = {"as it is": plain.ask("peak")["peak_bytes"], "kept": kept.ask("peak")["peak_bytes"]}
    speedup = timings["as it is"].median_ms / timings["kept"].median_ms
    print(f"{kind:<10} {name:<15} {precision:<16} {shape!s:<10} {speedup:.2f}", flush=True)
    return {
        "kind": kind,
        "model": name,
        "method": method,
        "precision": precision,
        "shape": shape,
        "speedup": speedup,
        "timings": {who: timing._asdict() for who, timing in timings.items()},
        "peak_bytes": peaks,
        "peak_ratio": peaks["kept"] / peaks["as it is"],
    }


if __name__ == "__main__":
    main()
