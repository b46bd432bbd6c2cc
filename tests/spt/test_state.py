"""Routers and codebooks follow PEFT's adapters of any method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from sparsepeft.spt.state import SptState


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("codebooks", torch.zeros(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.router = SptState(Router())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.router.current.weight.T).sum() + self.router.current.codebooks.sum()


CONFIGS = {
    "lora": LoraConfig(target_modules=["linear"], r=2),
    "ia3": IA3Config(target_modules=["linear"], feedforward_modules=[]),
}


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_trains_saves_and_loads_its_own_copy(method: str, tmp_path: Path) -> None:
    model = get_peft_model(Model(), CONFIGS[method])
    assert any("router.modules_to_save.default.weight" in name for name in trained_names(model))
    assert not any("original_module" in name or "linear.weight" in name for name in trained_names(model))
    state = model.base_model.model.router
    state.current.weight.data.fill_(1.0)
    state.current.codebooks.fill_(2.0)
    x = torch.ones(1, 4)
    expected = model(x)
    assert state.original_module.weight.eq(0).all()
    with model.disable_adapter():
        assert not torch.equal(model(x), expected)
    model.save_pretrained(str(tmp_path))

    again = PeftModel.from_pretrained(Model(), str(tmp_path))
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    assert trained_names(again) == []


def test_two_adapters_have_their_own(tmp_path: Path) -> None:
    model = get_peft_model(Model(), CONFIGS["lora"])
    state = model.base_model.model.router
    state.current.weight.data.fill_(1.0)
    model.add_adapter("second", CONFIGS["lora"])
    model.set_adapter("second")
    assert state.current.weight.eq(0).all()
    assert trained_names(model) == [n for n in dict(model.named_parameters()) if ".second." in n]
    model.set_adapter("default")
    assert state.current.weight.eq(1).all()
    model.delete_adapter("second")
    assert list(state.modules_to_save) == ["default"]
    assert state.current.weight.eq(1).all()


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_keeps_the_state_in_the_model(merge: bool) -> None:
    model = get_peft_model(Model(), CONFIGS["lora"])
    model.base_model.model.router.current.weight.data.fill_(1.0)
    bare = model.merge_and_unload() if merge else model.unload()
    assert isinstance(bare.router, SptState)
    assert bare.router.current is bare.router.original_module
    assert bare.router.current.weight.eq(float(merge)).all()


def test_without_peft_it_is_a_module_like_any_other() -> None:
    model = Model()
    model(torch.ones(1, 4)).sum().backward()
    assert model.router.current.weight.grad is not None
