"""A tiny local backbone with a real tokenizer, and small data files for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sparsepeft.training import RunConfig


def topics_rows(part: str) -> list[dict[str, str]]:
    """The built-in sample's rows."""
    text = resources.files("sparsepeft.tasks").joinpath(f"topics/{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def save_tiny_backbone(
    folder: Path,
    seed: int = 0,
    max_positions: int = 64,
    padding_side: str = "right",
    build: Callable[..., hf.PreTrainedModel] = lambda **config: hf.BertModel(hf.BertConfig(**config)),
    **config: Any,
) -> Path:
    """Save a two-layer BERT (or what ``build`` makes of a config) and a word tokenizer for the built-in sample."""
    words = {word for row in topics_rows("train") for word in row["text"].lower().replace(".", " ").split()}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_positions,
        padding_side=padding_side,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": max_positions,
        "pad_token_id": 0,
    }
    build(**(values | config)).save_pretrained(folder)
    return folder


def save_tiny_language_model(folder: Path, **config: Any) -> Path:
    """Save a two-layer Llama with grouped heads and the word tokenizer; [SEP] ends a document."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 3, "bos_token_id": 2}
    return save_tiny_backbone(
        folder, build=lambda **values: hf.LlamaForCausalLM(hf.LlamaConfig(**values)), **(sizes | config)
    )


def topics_text(folder: Path) -> Path:
    """The built-in sample as one plain text."""
    path = folder / "topics.txt"
    path.write_text("\n".join(row["text"].lower() for row in topics_rows("train")), encoding="utf-8")
    return path


def run_config(backbone: Path, folder: Path, **changes: Any) -> RunConfig:
    """A short training run on the built-in sample."""
    values = {"task": "topics", "output_dir": str(folder), "model": str(backbone), "max_steps": 12, "batch_size": 8}
    return RunConfig(**(values | changes))


class Interrupt(hf.TrainerCallback):
    """Stops a run like Ctrl-C does, after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
