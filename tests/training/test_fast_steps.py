"""What makes training steps faster on a CPU: used where it was measured to be, and no other model comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import run_config
from transformers import LlamaConfig, LlamaForCausalLM

from sparsepeft.models import DeferredLogits, deferred_logits, onednn
from sparsepeft.models.onednn import OneDnnLinear, can_onednn_compute
from sparsepeft.ops import dropout
from sparsepeft.training import fit, model, train


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What runs compute by, all of it being faster here."""
    found: set[str] = set()
    monkeypatch.setattr(fit, "is_compiled_dropout_faster", lambda: True)
    monkeypatch.setattr(model, "is_onednn_faster", can_onednn_compute)
    for owner, name in ((dropout, "dropout"), (dropout, "attention"), (onednn, "onednn_product")):

        def noting(*args: Any, name: str = name, function: Any = getattr(owner, name)) -> Any:  # noqa: B008
            found.add(name)
            return function(*args)

        monkeypatch.setattr(owner, name, noting)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_runs_use_what_is_faster_and_can_be_repeated(tiny_backbone: Path, tmp_path: Path, used: set[str]) -> None:
    for name in ("first", "second"):
        train(run_config(tiny_backbone, tmp_path / name, method="spartan"))
    assert used >= {"dropout", "attention"}
    assert ("onednn_product" in used) == can_onednn_compute(torch.float32)
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in first.values())


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"precision": "bf16", "method": "lora"}])
def test_runs_with_options(option: dict[str, Any], tiny_backbone: Path, tmp_path: Path, used: set[str]) -> None:
    train(run_config(tiny_backbone, tmp_path / "run", **option))
    recomputes = "gradient_checkpointing" in option  # with PyTorch's dropout, as backward does
    assert ("attention" in used) == (not recomputes)


def test_a_language_models_head_keeps_its_logits_deferred(used: set[str]) -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    )
    model.compute_by_onednn(llama, "fp32", True)
    ids = torch.randint(99, (2, 7))
    with deferred_logits(llama):
        assert isinstance(llama(input_ids=ids, labels=ids).logits, DeferredLogits)
    assert type(llama.lm_head) is OneDnnLinear
