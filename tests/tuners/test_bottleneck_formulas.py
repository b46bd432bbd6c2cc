"""Bottleneck adapters against their formulas, written out with the layers' own parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import ARCHITECTURES, METHODS, SUPPORTED, D, adapted, build, cast, run, task_layers
from torch import nn
from torch.nn import functional as F

from sparsepeft.models.blocks import find_blocks
from sparsepeft.tuners.layer import TaskTunerLayer

POST_LN = ["bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "bart", "bart-seqcls"]
POST_LN += ["wav2vec2", "xlnet"]
STYLES = ["pfeiffer", "houlsby"]
EVERY = [(style, name) for style, name in SUPPORTED if style in STYLES]
Adapter = Callable[[torch.Tensor], torch.Tensor]

# -- whole layers by hand ----------------------------------------------------------------------------------------------


def _norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(states, (D,), module.weight, module.bias, module.eps)


def _bert(layer: Any, x: torch.Tensor, given: dict, style: str, first: Adapter, second: Adapter) -> torch.Tensor:
    h = layer.attention.output.dense(layer.attention.self(x, **given)[0])
    a = _norm(layer.attention.output.LayerNorm, x + h + (first(h) if style == "houlsby" else 0))
    h = layer.output.dense(layer.intermediate(a))
    last = layer.output.LayerNorm
    return _norm(last, a + h + (second(h) if style == "houlsby" else second(_norm(last, a + h))))


def _pre_ln(norm: str, attention: str, next_norm: str) -> Callable[..., torch.Tensor]:
    def output(layer: Any, x: torch.Tensor, given: dict, style: str, first: Adapter, second: Adapter) -> torch.Tensor:
        h = getattr(layer, attention)(getattr(layer, norm)(x), **given)[0]
        a = x + h + (first(h) if style == "houlsby" else 0)
        h = layer.mlp(getattr(layer, next_norm)(a))
        return a + h + (second(h) if style == "houlsby" else second(a + h))

    return output


BY_HAND = {
    "bert": _bert,
    "gpt2": _pre_ln("ln_1", "attn", "ln_2"),
    "llama": _pre_ln("input_layernorm", "self_attn", "post_attention_layernorm"),
}


def _layer_inputs(name: str) -> dict[str, Any]:
    """What the second layer is given, without caches."""
    model = build(name).double()
    block = find_blocks(model)[1].module
    given: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.update(inspect.signature(block.forward).bind(*args, **kwargs).arguments)

    block.register_forward_pre_hook(note, with_kwargs=True)
    run(model, ARCHITECTURES[name].inputs())
    return {key: given[key] for key in ("attention_mask", "position_embeddings") if given.get(key) is not None}


def _adapter(module: Any, style: str) -> Adapter:
    def adapter(states: torch.Tensor) -> torch.Tensor:
        middle = states @ module.down.weight.T + module.down.bias
        middle = middle.clamp(min=0) if style == "pfeiffer" else middle / (1 + (-middle).exp())
        return middle @ module.up.weight.T + module.up.bias

    return adapter


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_layer_and_its_gradients_equal_the_formulas(name: str, style: str) -> None:
    """In float64, so that nothing but the order of additions differs."""
    given = _layer_inputs(name)
    layer = task_layers(adapted(build(name), config=METHODS[style]()).double())[1]
    modules = [c["default"] for c in (layer.bottleneck_attention, layer.bottleneck_ffn, layer.bottleneck_output) if c]
    x, probe = torch.randn(2, 3, 7, D, dtype=torch.float64)
    output = layer(x, **given)
    bare = find_blocks(build(name).double())[1].module
    adapters = [_adapter(module, style) for module in modules]
    expected = BY_HAND[name](bare, x, given, style, adapters[0], adapters[-1])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert len(parameters) == {"pfeiffer": 4, "houlsby": 8}[style]
    found = torch.autograd.grad((output * probe).sum(), parameters)
    by_hand = torch.autograd.grad((expected * probe).sum(), parameters)
    for one, other in zip(found, by_hand, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- the right place in every architecture -----------------------------------------------------------------------------


def _trace(model: PeftModel, layer: TaskTunerLayer, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """In the order of the layer's first call: what each of its norms receives, and at the end what it returns."""
    calls: list[list[torch.Tensor]] = [[]]

    def note_output(module: nn.Module, args: tuple, output: Any) -> None:
        calls[-1].append(output if isinstance(output, torch.Tensor) else output[0])
        calls.append([])

    handles = [
        module.register_forward_pre_hook(lambda module, args: calls[-1].append(args[0]))
        for module in layer.base_layer.modules()
        if "norm" in type(module).__name__.lower()
    ]
    handles.append(layer.base_layer.register_forward_hook(note_output))
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return calls[0]


def _first_layers(model: PeftModel) -> list[TaskTunerLayer]:
    blocks = find_blocks(model.get_base_model())
    return [layer for layer, block in zip(task_layers(model), blocks, strict=True) if block.index == 0]


def _silence(model: PeftModel) -> None:
    """Make every adapter's output zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default.up." in name:
                parameter.zero_()


@pytest.mark.parametrize("name", [name for style, name in EVERY if style == "houlsby"])
def test_houlsby_changes_what_is_added_to_the_residual_after_attention_and_ffn(name: str) -> None:
    """An adapter that adds 0.75 everywhere shows in what follows its sum first, and there alone as 0.75."""
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, config=METHODS["houlsby"]())
    _silence(model)
    for layer in _first_layers(model):
        expected = _trace(model, layer, inputs)
        changed = {}
        for place in ("attention", "ffn"):
            bias = getattr(layer, f"bottleneck_{place}")["default"].up.bias
            nn.init.constant_(bias, 0.75)
            found = _trace(model, layer, inputs)
            nn.init.zeros_(bias)
            changed[place] = next(i for i, x in enumerate(expected) if not torch.equal(x, found[i]))
            difference = found[changed[place]] - expected[changed[place]]
            torch.testing.assert_close(difference, torch.full_like(difference, 0.75), rtol=0, atol=1e-5)
        # The last sum is the layer's output, or what the norm at its end receives; cross-attention has a sum between.
        assert changed["ffn"] == len(expected) - (2 if name in POST_LN else 1)
        assert changed["attention"] == changed["ffn"] - (2 if layer.is_decoder else 1)


@pytest.mark.parametrize("name", [name for style, name in EVERY if style == "pfeiffer"])
def test_pfeiffer_follows_the_sum_and_norms_it_again_where_the_layer_ends_in_a_norm(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, config=METHODS["pfeiffer"]())
    weights = {layer: layer.bottleneck_output["default"].up.weight.clone() for layer in _first_layers(model)}
    _silence(model)
    for layer, weight in weights.items():
        *norm_inputs, plain = _trace(model, layer, inputs)
        adapter = layer.bottleneck_output["default"]
        adapter.up.weight.data.copy_(weight)
        found = _trace(model, layer, inputs)[-1]
        added = adapter(plain).detach()
        adapter.up.weight.data.zero_()
        # Fresh norms have weight one and bias zero, so what leaves them has mean zero and variance one.
        assert _is_normed(plain) == (name in POST_LN)
        assert _is_normed(found) == (name in POST_LN)
        expected = _standardized(norm_inputs[-1] + added) if name in POST_LN else plain + added
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # 1e-5: the norms' epsilon, over the variance


def _is_normed(states: torch.Tensor) -> bool:
    mean, variance = states.mean(-1), states.var(-1, unbiased=False)
    return bool((mean.abs() < 1e-4).all() and ((variance - 1).abs() < 1e-2).all())


def _standardized(states: torch.Tensor) -> torch.Tensor:
    return (states - states.mean(-1, keepdim=True)) / states.var(-1, unbiased=False, keepdim=True).sqrt()


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
def test_half_precision_takes_the_same_form(name: str, style: str, dtype: torch.dtype) -> None:
    """BART clamps its norm's output in float16, so that the layer returns another tensor than its norm."""
    inputs = ARCHITECTURES[name].inputs()
    whole = adapted(name, config=METHODS[style]())
    half = adapted(build(name).to(dtype), config=METHODS[style]())
    assert all(p.dtype == torch.float32 for n, p in half.named_parameters() if ".default." in n)
    for wide, narrow in zip(_first_layers(whole), _first_layers(half), strict=True):
        expected = _trace(whole, wide, inputs)[-1]
        found = _trace(half, narrow, cast(inputs, dtype))[-1]
        assert found.dtype == dtype
        with whole.disable_adapter():
            bare = _trace(whole, wide, inputs)[-1]
        # A dozen roundings, to 8 bits in bfloat16 and 11 in float16, beside what another form would change.
        error = (found.float() - expected).abs().mean() / (bare - expected).abs().mean()
        assert error < 16 * torch.finfo(dtype).eps
