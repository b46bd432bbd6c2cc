"""Tiny models that two processes train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.spt.models import TARGETS, V, build

from sparsepeft import BottleneckConfig, SpartanConfig, SptConfig, sparsify
from sparsepeft_research.experiments.processes import Job

STEPS, BATCH, LENGTH = 20, 8, 12


@dataclass(frozen=True)
class Case:
    """A model; ``tolerance`` is of its losses."""

    build: Callable[[], Any]
    layer: str = "BertLayer"
    tolerance: float = 1e-5


def classifier(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = build("bert").to(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def two_adapters() -> Any:
    model = classifier(SpartanConfig(task_type="SEQ_CLS"))
    model.add_adapter("other", SpartanConfig(task_type="SEQ_CLS", num_parents=4, top_k=2))
    return model


def sparse_with_lora() -> Any:
    # Routers and codebooks, which are refreshed three times. Balance is judged over the tokens of a process, so its
    # loss is the one thing that would differ.
    config = SptConfig(top_l=6, num_blocks=4, num_active_blocks=2, codebook_interval=5, load_balancing_coef=0.0)
    model = sparsify(build("llama"), config, calibration_data=torch.arange(3, V)[: 3 * 24].view(3, 24))
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=TARGETS["llama"], r=3, init_lora_weights=False))


SPARTAN = SpartanConfig(task_type="SEQ_CLS")
CASES = {
    "spartan": Case(partial(classifier, SPARTAN)),
    "spartan-norms": Case(partial(classifier, SpartanConfig(task_type="SEQ_CLS", train_layer_norms=True))),
    "spartan-bf16": Case(partial(classifier, SPARTAN, torch.bfloat16), tolerance=1e-2),
    "bottleneck": Case(partial(classifier, BottleneckConfig(task_type="SEQ_CLS", style="houlsby"))),
    "two-adapters": Case(two_adapters),
    "lora-spt": Case(sparse_with_lora, "LlamaDecoderLayer"),
}


def job(name: str, strategy: str, folder: Path, **options: Any) -> Job:
    """A case as a job; its folder is made."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    examples = []
    for _ in range(STEPS * BATCH):
        ids = torch.randint(3, V, (LENGTH,), generator=generator)
        labels = ids if name == "lora-spt" else torch.randint(0, 2, (), generator=generator)
        examples.append({"input_ids": ids, "labels": labels})
    arguments = {"per_device_train_batch_size": BATCH, "learning_rate": 3e-3, "seed": 3}
    arguments |= {"save_strategy": "steps", "save_steps": STEPS // 2}
    case = CASES[name]
    counts_tokens = name == "lora-spt"
    return Job(strategy, case.build, case.layer, examples, folder, counts_tokens, arguments=arguments, **options)
