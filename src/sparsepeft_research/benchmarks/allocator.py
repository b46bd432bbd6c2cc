"""What reusing freed memory gives: ``sparsepeft.devices.keep_freed_memory`` against the allocator as it is.

    sparsepeft benchmark allocator --language-model FOLDER --output allocator.json

Inference and training passes, each in two processes that take turns: one as PyTorch users run it, one that keeps what
tensors free. Random weights and tokens. Peak memory is that of the process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsepeft.backbones import resolve_model
from sparsepeft_research.benchmarks.inference.workloads import prepare_model
from sparsepeft_research.benchmarks.measuring import as_dicts, time_alternating
from sparsepeft_research.benchmarks.registry import Progress
from sparsepeft_research.benchmarks.workers import Worker

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


def run(*, language_model: str, repeats: int, idle_wait: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Measure all cases; that of a language model is left out without one."""
    threads = torch.get_num_threads()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        roberta = prepare_model(ROBERTA, Path(folder), seed).folder
        models = {ROBERTA: roberta, MINILM: resolve_model(None), LANGUAGE_MODEL: language_model}
        results = []
        for kind, name, precision, shape in CASES:
            if models[name]:
                case = {"kind": kind, "model": models[name], "precision": precision, "shape": shape}
                results.append(measure(name, case | {"seed": seed, "threads": threads}, repeats, idle_wait))
                progress(f"{kind} {name} {precision} {shape}: {results[-1]['speedup']:.2f} times as fast")
    return {"results": results}


def measure(name: str, settings: dict[str, Any], repeats: int, idle_wait: float) -> dict[str, Any]:
    """Both processes of one case."""
    is_inference, threads = settings["kind"] == "inference", settings["threads"]
    method = None if is_inference else "lora" if name == LANGUAGE_MODEL else "spartan"
    settings = settings | {"method": method}
    with tempfile.TemporaryDirectory() as folder:

        def start(keep: bool) -> Worker:
            path = Path(folder) / f"{keep}.json"
            path.write_text(json.dumps(settings | {"keep": keep}))
            command = [sys.executable, "-m", f"{__package__}.allocator_process", str(path)]
            return Worker(command, threads, path.with_suffix(".log"))

        with start(False) as plain, start(True) as kept:
            asked = {"as it is": partial(plain.ask, "pass pass"), "kept": partial(kept.ask, "pass pass")}
            timings = time_alternating(asked, repeats=repeats, idle_wait_s=idle_wait)
            peaks = {"as it is": plain.ask("peak")["peak_bytes"], "kept": kept.ask("peak")["peak_bytes"]}
    speedup = timings["as it is"].median_ms / timings["kept"].median_ms
    return {
        **{key: settings[key] for key in ("kind", "method", "precision", "shape")},
        "model": name,
        "speedup": speedup,
        "timings": as_dicts(timings),
        "peak_bytes": peaks,
        "peak_ratio": peaks["kept"] / peaks["as it is"],
    }
