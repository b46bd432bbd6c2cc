"""What must hold on every architecture: attaching, switching off, saving, detaching, counting."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model
from tests.models import (
    ARCHITECTURES,
    METHODS,
    REFUSED,
    SMALL,
    SUPPORTED,
    adapted,
    adapter_parameters,
    add,
    answers,
    backward_through_everything,
    build,
    randomize,
    run,
    task_layers,
)
from torch import nn

from sparsepeft import SpartanConfig
from sparsepeft.tuners.layer import TaskTunerLayer


@pytest.mark.parametrize(("method", "name"), SUPPORTED)
def test_attached_trained_saved_loaded_and_taken_away(method: str, name: str, tmp_path) -> None:
    inputs = ARCHITECTURES[name].inputs()
    bare = build(name)
    expected, num_hooks = run(bare, inputs), _num_hooks(bare)
    model = adapted(bare, config=METHODS[method](), random=False)
    if method in ("spartan", "bitfit"):  # fresh bottleneck adapters have values, as in `adapters`
        assert torch.equal(run(model, inputs), expected)
    layers, added = task_layers(model), adapter_parameters(model)
    assert len(layers) == ARCHITECTURES[name].num_blocks
    counted = sum(p.numel() for p in added.values())
    text, value = model.base_model.parameter_formula()
    assert value == counted == sum(_number(method, layer) for layer in layers)
    assert f"{counted:,}" in text

    randomize(model)
    backward_through_everything(model.train(), inputs)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n, _ in model.named_parameters() if "modules_to_save.default" in n}
    assert trained == set(added) | head
    assert bool(head) == ARCHITECTURES[name].has_head
    # A key's bias adds the same to all scores of a query, so its gradient is zero.
    assert all(p.grad.any() for n, p in added.items() if method != "bitfit" or not _is_key(n))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()

    changed = run(model.eval(), inputs)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    model.requires_grad_(False)  # torch.matmul's choice of kernel, and so its rounding, depends on it
    assert torch.equal(run(loaded, inputs), run(model, inputs))

    bare = model.unload()
    assert torch.equal(run(bare, inputs), expected)
    assert not task_layers(bare)
    assert bare.state_dict().keys() == build(name).state_dict().keys()
    assert _num_hooks(bare) == num_hooks


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _number(method: str, layer: TaskTunerLayer) -> int:
    width = layer.hidden_size
    if method == "spartan":
        return SMALL["num_parents"] * (1 + 2 * SMALL["num_children"]) * width
    if method == "bitfit":
        return sum(p.numel() for n, p in layer.base_layer.named_parameters() if n.endswith(".bias"))
    middle = {32: {"pfeiffer": 6, "houlsby": 4}, 16: {"pfeiffer": 3, "houlsby": 2}, 8: {"pfeiffer": 1, "houlsby": 1}}
    size = middle[width][method]
    return (1 if method == "pfeiffer" else 2) * (size * width + size + width * size + width)


def _is_key(name: str) -> bool:
    return name.rpartition("-")[2] in ("key", "k_proj", "k_lin", "k")


# XLNet's batch is its second dimension, Mixtral flattens it, Whisper's encoder and decoder have different lengths.
MIXED = [(method, name) for method in METHODS for name in ("bert", "bart", "whisper")]
MIXED += [("spartan", name) for name in ("xlnet", "mixtral", "llama-seqcls", "clip-imagecls", "albert")]


@pytest.mark.parametrize(("method", "name"), MIXED)
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(method: str, name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, "one", config=METHODS[method]())
    add(model, "two", config=_other(method))
    alone = answers(model, inputs, "one", "two")
    mixed = run(model, inputs, adapter_names=["two", "__base__", "one"])
    assert mixed.shape[0] == 3
    for row, adapter in enumerate(("two", "__base__", "one")):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-4, atol=1e-5)


def test_a_bias_that_acts_once_for_all_rows_is_refused_in_a_mixed_batch() -> None:
    model = adapted("deberta-v2", "one", config=METHODS["bitfit"]())
    with pytest.raises(ValueError, match=r"pos_key_proj.*once for all rows.*batch of their own"):
        run(model, ARCHITECTURES["deberta-v2"].inputs(), adapter_names=["one", "__base__", "one"])


def _other(method: str) -> PeftConfig:
    """An adapter that can share a backbone with ``method``, of another size (and style)."""
    if method == "spartan":
        return METHODS[method](num_parents=4, num_children=3, top_k=2)
    if method == "bitfit":
        return METHODS[method]()
    return METHODS["houlsby" if method == "pfeiffer" else "pfeiffer"](reduction_factor=3)


@pytest.mark.parametrize("name", ["bert", "bart", "swin"])
def test_layers_to_transform_picks_positions_of_each_stack(name: str) -> None:
    model = adapted(name, layers_to_transform=[0], random=False)
    names = [n for n, module in model.named_modules() if isinstance(module, TaskTunerLayer)]
    stacks = {n.rpartition(".")[0] for n in names}
    assert names
    assert len(names) == len(stacks)
    assert all(n.endswith(".0") for n in names)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in REFUSED for name in REFUSED[method]])
def test_what_an_architecture_lacks_is_said_and_leaves_it_as_it_was(method: str, name: str) -> None:
    bare = build(name)
    expected = run(bare, ARCHITECTURES[name].inputs())
    num_hooks = _num_hooks(bare)
    remedy = {"houlsby": "attention_module.*style='pfeiffer'", "bitfit": "no biases.*another method"}[method]
    with pytest.raises(ValueError, match=remedy):
        get_peft_model(bare, METHODS[method]())
    assert torch.equal(run(bare, ARCHITECTURES[name].inputs()), expected)
    assert _num_hooks(bare) == num_hooks


def test_albert_shares_one_memory_among_its_calls() -> None:
    model = adapted("albert")
    calls = []
    (layer,) = task_layers(model)
    layer.spartan_memory["default"].register_forward_hook(lambda *args: calls.append(1))
    run(model, ARCHITECTURES["albert"].inputs())
    assert len(calls) == build("albert").config.num_hidden_layers


def test_without_transformer_layers_target_modules_must_name_modules_that_return_states() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(hf.ResNetForImageClassification(config), SpartanConfig(**SMALL))
    assert "resnet.encoder.stages.0" in str(error.value)
    assert "ResNetStage" in str(error.value)
    stages = ["resnet.encoder.stages.0"]
    model = adapted(hf.ResNetForImageClassification(config), target_modules=stages, random=False)
    with pytest.raises(ValueError, match="target_modules"):
        model(pixel_values=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"target_modules": ["blocks"]}, r"encoder\.layer\.0"), ({"layers_to_transform": [3]}, "0 to 2")],
)
def test_layers_that_are_not_there_are_an_error_that_names_those_that_are(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted("bert", **wrong)


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
    assert len(task_layers(model)) == (1 if target_modules == ["steps.1"] else 2)


def test_names_that_peft_could_confuse_with_the_backbones_are_refused() -> None:
    for name in (
        "encoder",
        "classifier",
        "__base__",
        "model",
        "a.b",
        "train",
        "double",
        "keys",
        "training",
        "_aside",
        "",
    ):
        with pytest.raises(ValueError, match="another name"):
            adapted("bert", name)
