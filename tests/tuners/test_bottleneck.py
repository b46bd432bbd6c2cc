"""Bottleneck adapters: config, fresh values, coming and going. The formulas have a file of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, METHODS, D, adapted, add, answers, build, randomize, run, task_layers
from torch import nn

from sparsepeft import BottleneckConfig

INPUTS = ARCHITECTURES["bert"].inputs()
STYLES = pytest.mark.parametrize("style", ["pfeiffer", "houlsby"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"style": "parallel"}, r"style.*'parallel'.*houlsby, pfeiffer"),
        ({"reduction_factor": 0}, "reduction_factor=0.*above 0"),
        ({"reduction_factor": -2}, "reduction_factor=-2"),
        ({"reduction_factor": "16"}, "reduction_factor='16'"),
        ({"reduction_factor": True}, "reduction_factor=True"),
        ({"non_linearity": "rleu"}, "'rleu'.*did you mean 'relu'"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1"),
        ({"initializer_range": "small"}, "initializer_range='small'"),
    ],
)
def test_a_wrong_config_says_which_field(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**wrong)


@pytest.mark.parametrize(("factor", "size"), [(12, 2), (16, 2), (6.5, 4), (0.5, 64), (D, 1), (D + 1, 1), (1000, 1)])
def test_the_bottleneck_is_the_width_over_the_factor_rounded_down_but_at_least_one(factor: float, size: int) -> None:
    model = adapted("bert", config=METHODS["pfeiffer"](reduction_factor=factor))
    assert all(a.down.weight.shape == (size, D) and a.up.weight.shape == (D, size) for a in _adapters(model))
    assert not torch.allclose(run(model, INPUTS), run(build("bert"), INPUTS))


def _adapters(model: PeftModel) -> list[nn.Module]:
    """The bottlenecks of all layers and places."""
    containers = [(m.bottleneck_attention, m.bottleneck_ffn, m.bottleneck_output) for m in task_layers(model)]
    return [adapter for each in containers for container in each for adapter in container.values()]


@pytest.mark.parametrize(
    ("style", "given", "activation"),
    [
        ("pfeiffer", None, nn.functional.relu),
        ("houlsby", None, nn.functional.silu),
        ("houlsby", "swish", nn.functional.silu),
        ("pfeiffer", "gelu", nn.functional.gelu),
        ("pfeiffer", "tanh", torch.tanh),
    ],
)
def test_the_activation_is_the_named_one(style: str, given: str | None, activation) -> None:
    x = torch.randn(5, D)
    for adapter in _adapters(adapted("bert", config=BottleneckConfig(style=style, non_linearity=given))):
        torch.testing.assert_close(adapter(x), adapter.up(activation(adapter.down(x))))


@STYLES
def test_fresh_weights_are_drawn_with_the_given_spread_and_biases_are_zero(style: str) -> None:
    config = METHODS[style](initializer_range=0.3, reduction_factor=0.25)
    for adapter in _adapters(adapted("bert", config=config, random=False)):
        for linear in (adapter.down, adapter.up):
            # 4096 values: their standard deviation is off by 1.1 % of itself, their mean by 0.3 / 64.
            assert linear.weight.std().item() == pytest.approx(0.3, rel=0.05)
            assert abs(linear.weight.mean().item()) < 0.025
            assert not linear.bias.any()


def test_an_initializer_range_of_zero_makes_a_fresh_adapter_change_nothing() -> None:
    model = adapted("bert", config=METHODS["houlsby"](initializer_range=0), random=False)
    assert torch.equal(run(model, INPUTS), run(build("bert"), INPUTS))


def test_rows_of_both_styles_and_of_the_bare_backbone_in_one_batch() -> None:
    inputs = ARCHITECTURES["bert"].inputs(batch=6)  # one row is padded
    model = adapted("bert", "narrow", config=METHODS["pfeiffer"](num_labels=5))
    add(model, "wide", config=METHODS["pfeiffer"](reduction_factor=2, non_linearity="gelu"))
    add(model, "both", config=METHODS["houlsby"](num_labels=3, head_type="linear"))
    add(model, "upper", config=METHODS["houlsby"](reduction_factor=3, layers_to_transform=[2]))
    alone = answers(model, inputs, "narrow", "wide", "both", "upper")
    names = ["both", "wide", "__base__", "upper", "narrow", "both"]
    mixed = run(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row, : alone[name].shape[1]], alone[name][row], rtol=1e-4, atol=1e-5)


@STYLES
def test_deleted_and_added_again_it_is_applied_once(style: str) -> None:
    expected = run(adapted("bert", "again", config=METHODS[style]()), INPUTS)
    model = adapted("bert", "first", config=METHODS[style]())
    for _ in range(2):
        with pytest.warns(UserWarning, match="no adapter is left"):
            model.delete_adapter(next(iter(model.peft_config)))
        assert torch.equal(run(model.base_model.model, INPUTS), run(build("bert"), INPUTS))
        add(model, "again", config=METHODS[style]())
        model.set_adapter("again")
        assert torch.equal(run(model, INPUTS), expected)
    calls = []
    for adapter in _adapters(model):
        adapter.register_forward_hook(lambda *args: calls.append(1))
    run(model, INPUTS)
    assert len(calls) == len(task_layers(model)) * {"pfeiffer": 1, "houlsby": 2}[style]


@pytest.mark.parametrize("name", ["bert", "albert", "xlnet"])
def test_a_feed_forward_in_chunks_is_refused_by_pfeiffer_and_taken_by_houlsby(name: str) -> None:
    model = build(name)
    model.config.chunk_size_feed_forward = 1
    chunked = type(model)(model.config).eval()
    chunked.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward=1.*set it to 0"):
        get_peft_model(chunked, METHODS["pfeiffer"]())
    if name != "xlnet":
        found = adapted(chunked, config=METHODS["houlsby"]())
        whole = adapted(name, config=METHODS["houlsby"]())
        torch.testing.assert_close(run(found, INPUTS), run(whole, INPUTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["attention_module", "ffn_module"])
def test_an_unknown_place_is_an_error_that_names_those_there_are(field: str) -> None:
    with pytest.raises(ValueError, match=f"'nowhere'.*{field}.*intermediate, output"):
        get_peft_model(build("bert"), METHODS["houlsby"](**{field: "nowhere"}))


def test_a_place_may_be_named_and_must_be_the_same_for_all_adapters() -> None:
    found = adapted("bert", config=METHODS["houlsby"](attention_module="attention.output.dropout"))
    expected = run(adapted("bert", config=METHODS["houlsby"]()), INPUTS)
    assert torch.equal(run(found, INPUTS), expected)
    with pytest.raises(ValueError, match=r"attention_module='attention.output'.*same module for all"):
        found.add_adapter("other", METHODS["houlsby"](attention_module="attention.output"))
    assert list(found.peft_config) == ["default"]
    assert torch.equal(run(found, INPUTS), expected)


class _Block(nn.Module):
    """A layer whose sublayers have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixing, self.spreading = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.mixing(self.norm(states))
        return states + self.spreading(states)


def test_named_places_open_a_layer_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"no attention sublayer.*attention_module.*norm, mixing, spreading"):
        get_peft_model(nn.Sequential(_Block()), METHODS["houlsby"](target_modules=["0"]))
    bare, x = nn.Sequential(_Block()), torch.randn(2, 3, D)
    (block,) = copy.deepcopy(bare)
    config = METHODS["houlsby"](target_modules=["0"], attention_module="mixing", ffn_module="spreading")
    model = get_peft_model(bare, config)
    randomize(model)
    (layer,) = task_layers(model)
    first, second = layer.bottleneck_attention["default"], layer.bottleneck_ffn["default"]
    h = block.mixing(block.norm(x))
    a = x + h + first(h)
    h = block.spreading(a)
    torch.testing.assert_close(model(x), a + h + second(h))
