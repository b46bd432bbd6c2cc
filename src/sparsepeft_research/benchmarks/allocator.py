"""What reusing freed memory gives: ``sparsepeft.devices.keep_freed_memory`` against the allocator as it is.

    sparsepeft benchmark allocator --language-model FOLDER --output allocator.json

Inference and training passes, each in two processes that take turns: one as PyTorch users run it, one that keeps what
tensors free. Random weights and tokens. Peak memory is that of the process. Each process is this module with a file of
settings as its argument: it does a pass of one kind, over and over.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparsepeft import SpartanConfig
from sparsepeft.backbones import resolve_model
from sparsepeft.devices import keep_freed_memory
from sparsepeft.models.onednn import use_onednn
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, serve
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
    method = None if settings["kind"] == "inference" else "lora" if name == LANGUAGE_MODEL else "spartan"
    settings = settings | {"method": method}
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", __spec__.name]
        plain, kept = (Worker(program, settings | {"keep": k}, Path(folder) / f"{k}.json") for k in (False, True))
        with plain, kept:
            passes = {"as it is": partial(plain.ask, "pass pass"), "kept": partial(kept.ask, "pass pass")}
            timings = time_alternating(passes, repeats=repeats, idle_wait_s=idle_wait)
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


def prepare(settings: dict[str, Any]) -> tuple[Mapping[str, Pass], dict[str, Any]]:
    """Set the allocator up if wanted, then the model."""
    about = {"is_kept": settings["keep"] and keep_freed_memory()}
    if settings["keep"] and not about["is_kept"]:
        raise RuntimeError("this system's C library is not glibc, or the environment sets its allocator up")
    torch.manual_seed(settings["seed"])
    torch.set_num_threads(settings["threads"])
    make = inference if settings["kind"] == "inference" else training
    return {"pass": make(settings)}, about


def inference(settings: dict[str, Any]) -> Pass:
    """The forward pass of a batch."""
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"]).eval()
    if settings["precision"] == "float32, oneDNN":
        use_onednn(model)
    if settings["precision"] == "bfloat16":
        model = model.bfloat16()
    input_ids = tokens(model, settings)

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        return [model(input_ids).logits]

    return run


def training(settings: dict[str, Any]) -> Pass:
    """Forward and backward pass of a batch, with an adapter; bfloat16 is autocast."""
    is_encoder = settings["method"] == "spartan"
    family = AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
    model = family.from_pretrained(settings["model"])
    config = SpartanConfig(task_type="SEQ_CLS") if is_encoder else LoraConfig(r=16, target_modules="all-linear")
    adapted = get_peft_model(model.train(), config)
    input_ids = tokens(model, settings)
    labels = torch.zeros(len(input_ids), dtype=torch.long) if is_encoder else input_ids

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bfloat16"):
            loss = adapted(input_ids=input_ids, labels=labels).loss
        loss.backward()
        adapted.zero_grad()
        return [loss.detach()]

    return run


def tokens(model: Any, settings: dict[str, Any]) -> torch.Tensor:
    """A batch of random ids, (B, T), no padding among them."""
    return torch.randint(5, model.config.vocab_size, settings["shape"])


if __name__ == "__main__":
    serve(prepare)
