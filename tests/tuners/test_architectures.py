"""What must hold on every architecture: attaching, switching off, saving, detaching, counting."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, SMALL, adapted, build, randomize, run
from torch import nn

from sparsepeft import SpartanConfig
from sparsepeft.tuners.spartan import SpartanLayer

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_a_fresh_memory_changes_nothing_and_switching_it_off_restores_every_bit(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    bare = build(name)
    expected = run(bare, inputs)
    num_hooks = _num_hooks(bare)
    model = adapted(bare, random=False)
    assert torch.equal(run(model, inputs), expected)
    randomize(model)
    assert not torch.allclose(run(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    assert not torch.allclose(run(model, inputs), expected)
    bare = model.unload()
    assert torch.equal(run(bare, inputs), expected)
    assert not any(isinstance(module, SpartanLayer) or "spartan" in key for key, module in bare.named_modules())
    assert bare.state_dict().keys() == build(name).state_dict().keys()
    assert _num_hooks(bare) == num_hooks


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@every_architecture
def test_every_layer_has_a_memory_of_the_formulas_size(name: str) -> None:
    model = adapted(name, random=False)
    layers = [module for module in model.modules() if isinstance(module, SpartanLayer)]
    assert len(layers) == ARCHITECTURES[name].num_blocks
    counted = sum(p.numel() for n, p in model.named_parameters() if "spartan_memory" in n)
    parents, children = SMALL["num_parents"], SMALL["num_children"]
    assert counted == sum(parents * (1 + 2 * children) * layer.hidden_size for layer in layers)
    text, value = model.base_model.parameter_formula()
    assert value == counted
    assert f"{counted:,}" in text


@every_architecture
def test_only_memory_and_head_get_gradients(name: str) -> None:
    model = adapted(name).train()
    output = model(**ARCHITECTURES[name].inputs())
    sum(
        v.float().square().mean() for v in output.values() if isinstance(v, torch.Tensor) and v.requires_grad
    ).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("spartan_memory.default" in n or "modules_to_save.default" in n for n in trained)
    memory = [p for n, p in model.named_parameters() if "spartan_memory" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in memory)
    has_head = any("modules_to_save.default" in n for n in trained)
    assert has_head == ARCHITECTURES[name].has_head


@every_architecture
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert not any(p.requires_grad for p in loaded.parameters())


@every_architecture
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, "one")
    model.add_adapter("two", SpartanConfig(num_parents=4, num_children=3, top_k=2))
    randomize(model, "two")
    alone = {}
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        alone[adapter] = run(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = run(model, inputs)
    mixed = run(model, inputs, adapter_names=["two", "__base__", "one"])
    assert mixed.shape[0] == 3
    for row, adapter in enumerate(("two", "__base__", "one")):
        if "clip" in name and mixed.dim() == 2 and mixed.shape[0] == mixed.shape[1] and "input_ids" in inputs:
            continue  # text-image scores compare rows with each other: no row belongs to one adapter
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-4, atol=1e-5)


@every_architecture
def test_layers_to_transform_picks_positions_of_each_stack(name: str) -> None:
    model = adapted(name, layers_to_transform=[0], random=False)
    names = [n for n, module in model.named_modules() if isinstance(module, SpartanLayer)]
    stacks = {n.rpartition(".")[0] for n in names}
    assert names
    assert len(names) == len(stacks)
    assert all(n.endswith(".0") for n in names)


def test_albert_shares_one_memory_among_its_calls() -> None:
    model = adapted("albert")
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, SpartanLayer))
    layer.spartan_memory["default"].register_forward_hook(lambda *args: calls.append(1))
    run(model, ARCHITECTURES["albert"].inputs())
    assert len(calls) == build("albert").config.num_hidden_layers


def _resnet() -> hf.ResNetForImageClassification:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
    return hf.ResNetForImageClassification(config)


def test_without_transformer_layers_the_error_names_target_modules_and_candidates() -> None:
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(_resnet(), SpartanConfig(**SMALL))
    assert "resnet.encoder.stages.0" in str(error.value)
    assert "ResNetStage" in str(error.value)


def test_target_modules_that_match_nothing_are_an_error_that_shows_candidates() -> None:
    with pytest.raises(ValueError, match=r"encoder\.layer\.0"):
        adapted("bert", target_modules=["blocks"])


def test_layers_to_transform_out_of_range_names_the_range() -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        adapted("bert", layers_to_transform=[3])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states + self.linear(states))


class _Plain(nn.Module):
    """A model that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.steps, self.head = nn.Linear(4, 8), nn.Sequential(_Block(8), _Block(8)), nn.Linear(8, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(self.steps(self.stem(states)))


@pytest.mark.parametrize("target_modules", [r"steps\.\d+", ["0", "1"], ["steps.1"]])
def test_target_modules_extend_any_module(target_modules: str | list[str]) -> None:
    bare = _Plain()
    states = torch.randn(3, 5, 4)
    expected = bare(states)
    model = get_peft_model(copy.deepcopy(bare), SpartanConfig(**SMALL, target_modules=target_modules))
    assert torch.equal(model(states), expected)
    randomize(model)
    assert not torch.allclose(model(states), expected)
    num_layers = sum(isinstance(module, SpartanLayer) for module in model.modules())
    assert num_layers == (1 if target_modules == ["steps.1"] else 2)


def test_a_layer_that_does_not_return_states_of_the_width_is_refused_in_words() -> None:
    model = adapted(_resnet(), target_modules=["resnet.encoder.stages.0"], random=False)
    with pytest.raises(ValueError, match="target_modules"):
        model(pixel_values=torch.randn(2, 3, 32, 32))


def test_names_that_peft_could_confuse_with_the_backbones_are_refused() -> None:
    for name in ("encoder", "classifier", "__base__", "model", "a.b"):
        with pytest.raises(ValueError, match="another name"):
            adapted("bert", name)
