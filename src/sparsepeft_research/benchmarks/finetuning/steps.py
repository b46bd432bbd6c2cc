"""Bare training steps of equal batches: ours and AdapterHub's, with and without what makes ours faster.

A step is forward and backward pass, clipping and AdamW, by the same loop in every process (``peers/training.py``), on
random tokens of one length without padding. bf16 is autocast, as in ``sparsepeft train --precision bf16``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from sparsepeft.devices import keep_freed_memory
from sparsepeft.methods.models import extend, load_backbone
from sparsepeft.methods.recipes import get_recipe
from sparsepeft.models.frozen import hold_frozen_linears
from sparsepeft.ops.dropout import CompiledDropout, is_compiled_dropout_faster
from sparsepeft.tasks import TaskSpec
from sparsepeft.training.model import compute_by_onednn
from sparsepeft_research.peers.training import train_on_command

NUM_EXAMPLES, STEPS = 256, 2
# What makes our steps faster, by itself off: settings of the process, and of the adapter.
OFF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "compiled memory off": ({}, {"impl": "torch"}),
    "compiled dropout off": ({"compiled_dropout": False}, {}),
    "oneDNN off": ({"onednn": False}, {}),
    "weights cast in each pass": ({"holds_weights": False, "onednn": False}, {}),
    "freed memory not kept": ({"keep_freed_memory": False}, {}),
    "all off": (
        {"compiled_dropout": False, "onednn": False, "holds_weights": False, "keep_freed_memory": False},
        {"impl": "torch"},
    ),
}
_SPEC = TaskSpec("steps", ("text",), ("no", "yes"), ("accuracy",), "accuracy", 3)


class Case(NamedTuple):
    """What every candidate trains on."""

    batch_size: int
    length: int
    precision: str


def cases(quick: bool) -> list[Case]:
    """Of each backbone; the quick one only shows that it works."""
    if quick:
        return [Case(2, 8, "fp32")]
    return [Case(*shape, precision) for shape in ((16, 128), (32, 64)) for precision in ("fp32", "bf16")]


def candidates(quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings of our processes by name, in sets of which each fits into a machine's memory together.

    SPARTAN is in all of them: the memories alone, as in the paper.
    """
    spartan = {"spartan": _settings("spartan")}
    norms = {"spartan, norms trained": _settings("spartan", train_layer_norms=True)}
    factors = {
        f"spartan, {name}": _settings("spartan", **adapter) | process for name, (process, adapter) in OFF.items()
    }
    if quick:
        return {"methods": spartan, "factors": spartan | factors}
    return {
        "methods": spartan | {name: _settings(name) for name in ("pfeiffer", "houlsby")},
        "others": spartan | norms | {name: _settings(name) for name in ("lora", "full")},
        "factors": spartan | factors,
    }


def _settings(method: str, **adapter: Any) -> dict[str, Any]:
    process = {"method": method, "onednn": None, "holds_weights": True, "compiled_dropout": True}
    return process | {
        "keep_freed_memory": True,
        "pad_to": None,
        "adapter": get_recipe("paper", method).adapter | adapter,
    }


def write_tokens(model: str, case: Case, seed: int, path: Path) -> None:
    """Write random examples, (NUM_EXAMPLES, T), of two labels."""
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = (NUM_EXAMPLES, case.length), AutoConfig.from_pretrained(model).vocab_size
    tokens = torch.randint(vocabulary // 10, vocabulary, size, generator=generator)  # the lowest have meanings
    labels = torch.randint(0, 2, (NUM_EXAMPLES,), generator=generator)
    save_file({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, path)


def our_model(settings: dict[str, Any]) -> nn.Module:
    """The model that ``sparsepeft train`` would train, with or without what makes it faster."""
    if settings["keep_freed_memory"]:
        keep_freed_memory()
    model = extend(load_backbone(settings["model"], _SPEC), settings["method"], _SPEC, settings["adapter"])
    if settings["holds_weights"] and settings["precision"] == "bf16":
        hold_frozen_linears(model, torch.bfloat16)
    compute_by_onednn(model, settings["precision"], settings["onednn"])
    if settings["compiled_dropout"] and is_compiled_dropout_faster():
        CompiledDropout().__enter__()  # until the process ends
    return model


if __name__ == "__main__":
    train_on_command(our_model)
