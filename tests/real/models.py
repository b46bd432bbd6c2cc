"""The two real models, and adapters trained on them in a few steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from sparsepeft import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig
from sparsepeft.methods.recipes import get_recipe

MPNET, GEMMA = "all-mpnet-base-v2", "gemma-3-270m"
LENGTH = 24  # tokens of a text
STEPS, BATCH = 20, 4

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "spartan": lambda name, **task: SpartanConfig(train_layer_norms=True, **task),
    "pfeiffer": lambda name, **task: BottleneckConfig(style="pfeiffer", **task),
    "houlsby": lambda name, **task: BottleneckConfig(style="houlsby", **task),
    "bitfit": lambda name, **task: BitFitConfig(**task),
    "head": lambda name, **task: HeadConfig(**task),
    "lora": lambda name, **task: LoraConfig(target_modules=["q", "v"] if name == MPNET else None, **task),
}
# Gemma has no biases.
SUPPORTED = [(name, method) for name in (MPNET, GEMMA) for method in METHODS if (name, method) != (GEMMA, "bitfit")]

Rows = list[dict[str, Any]]


def find_model(name: str) -> Path:
    """The folder of a real model, or a skip that says how to provide it."""
    default = Path.home() / ".cache" / "sparsepeft" / "models"
    folder = Path(os.environ.get("SPARSEPEFT_MODELS") or default) / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds no model: set SPARSEPEFT_MODELS to the folder that {name} is in")
    return folder


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(find_model(name))


def classifier(name: str, num_labels: int, seed: int = 0) -> PreTrainedModel:
    """The model with a fresh head, which depends on ``seed``, in its checkpoint's dtype."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(find_model(name), num_labels=num_labels)


def language_model(**values: Any) -> PreTrainedModel:
    """Gemma, in its checkpoint's dtype (bfloat16) unless ``values`` say otherwise."""
    return AutoModelForCausalLM.from_pretrained(find_model(GEMMA), **values)


def encoded(name: str, rows: Rows) -> tuple[list[dict[str, Any]], DataCollatorWithPadding]:
    """The rows as token ids with labels, and what makes batches of them."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
    examples = [{"input_ids": one, "labels": row["label"]} for one, row in zip(ids, rows, strict=True)]
    return examples, DataCollatorWithPadding(tokenizer)


def batch_of(name: str, rows: Rows) -> dict[str, torch.Tensor]:
    """The rows as one padded batch, without labels."""
    examples, collator = encoded(name, rows)
    batch = dict(collator(examples))
    del batch["labels"]
    return batch


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


def changed_tensors(model: PreTrainedModel, original: PreTrainedModel) -> list[str]:
    """Names of the tensors that only one of the models has, or that are not the same bit for bit."""
    found, expected = model.state_dict(), original.state_dict()
    return [name for name in found | expected if not _same(found.get(name), expected.get(name))]


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained, saved, and taken off again.

    Attributes:
        folder: where it was saved.
        losses: on the training rows, before and after.
        logits: of the training rows, after.
        changed: the backbone's tensors that are not as they were, once the adapter is off.
    """

    folder: Path
    losses: tuple[float, float]
    logits: torch.Tensor
    changed: list[str]


def train_adapter(name: str, method: str, rows: Rows, label_names: tuple[str, ...], folder: Path) -> Trained:
    """Twenty steps of transformers' Trainer on a few rows."""
    config = METHODS[method](name, task_type="SEQ_CLS")
    model = get_peft_model(classifier(name, len(label_names)), config)
    examples, collator = encoded(name, rows)
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            checkpoints,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=get_recipe("best", method).learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=examples, eval_dataset=examples)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(str(folder))
    logits = logits_of(model, batch_of(name, rows))
    changed = changed_tensors(model.unload(), classifier(name, len(label_names)))
    return Trained(folder, (before, after), logits, changed)


def load_adapter(name: str, folder: Path, num_labels: int) -> PeftModel:
    """A saved adapter on the model, whose own head is another than in training."""
    return PeftModel.from_pretrained(classifier(name, num_labels, seed=1), str(folder))
