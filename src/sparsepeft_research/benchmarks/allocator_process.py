"""One process of the benchmark ``allocator``: a pass of one kind, over and over.

python -m sparsepeft_research.benchmarks.allocator_process SETTINGS.json
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparsepeft import SpartanConfig
from sparsepeft.devices import keep_freed_memory
from sparsepeft.inference.onednn import use_onednn
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, serve


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
