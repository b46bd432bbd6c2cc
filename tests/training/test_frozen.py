"""Frozen weights held as autocast casts them: the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from tests.models import ARCHITECTURES, METHODS, adapted, build, gradients, labelled_inputs, without_dropout

from sparsepeft.models.frozen import hold_frozen_linears

NAMES = [name for name in ARCHITECTURES if name not in ("clip", "t5", "whisper")]
CONFIGS: dict[str, PeftConfig] = {
    "spartan": METHODS["spartan"](train_layer_norms=True),
    "lora": LoraConfig(r=2, target_modules="all-linear"),
}


def under_autocast(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(model, inputs) | {"loss": model(**inputs).loss}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_same_numbers(method: str, name: str) -> None:
    model = without_dropout(adapted(name, config=copy.deepcopy(CONFIGS[method])))
    inputs = labelled_inputs(name)
    before = under_autocast(model, inputs)
    hold_frozen_linears(model, torch.bfloat16)
    after = under_autocast(model, inputs)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []


def test_what_is_held() -> None:
    model = adapted("llama")  # whose head is its embedding's weight
    model.base_model.model.tie_weights()
    model.base_model.model.lm_head.weight = model.base_model.model.model.embed_tokens.weight
    hold_frozen_linears(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    halves = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halves == {name for name in dtypes if name.endswith("_proj.weight")}
    whole = build("bert")
    hold_frozen_linears(whole, torch.bfloat16)  # nothing is frozen
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
