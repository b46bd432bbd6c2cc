"""Gradients: under both kinds of gradient checkpointing, with and without the load-balancing loss."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, SMALL, build, randomize
from torch import nn

from sparsepeft import SpartanConfig
from sparsepeft.ops.load_balancing import load_balancing_loss
from sparsepeft.tuners.spartan import SpartanLayer

LABELS = torch.tensor([1, 0, 1])
KINDS = pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])


def _model(name: str, **config) -> PeftModel:
    backbone = build(name)
    for module in backbone.modules():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout"):  # two runs are compared
            if isinstance(vars(module).get(attribute), float):
                setattr(module, attribute, 0.0)
    model = get_peft_model(backbone, SpartanConfig(**SMALL, **config))
    randomize(model)
    return model.train()


def _inputs(name: str) -> dict[str, torch.Tensor]:
    inputs = ARCHITECTURES[name].inputs()
    text = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    labels = LABELS if ARCHITECTURES[name].has_head else text
    return inputs | {"labels": labels}


def _gradients(model: PeftModel, inputs: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(**inputs).loss * scale).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def _checkpoint(model: PeftModel, use_reentrant: bool | None) -> None:
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


# MPNet, ALBERT and XLNet do not support checkpointing in transformers.
NAMES = [
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "modernbert",
    "deberta-v2",
    "gpt2",
    "llama",
    "mixtral",
    "t5",
    "bart",
    "vit",
    "whisper",
    "clip-imagecls",
]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_without_checkpointing(name: str, use_reentrant: bool) -> None:
    inputs = _inputs(name)
    expected = _gradients(_model(name), inputs)
    model = _model(name)
    _checkpoint(model, use_reentrant)
    runs = []
    layer = next(module for module in model.modules() if isinstance(module, SpartanLayer))
    inner = next(module for module in layer.base_layer.modules() if "Norm" in type(module).__name__)
    inner.register_forward_hook(lambda *args: runs.append(1))
    model(**inputs)
    once = len(runs)
    found = _gradients(model, inputs)
    assert len(runs) == 3 * once  # or nothing was computed again, and the test shows nothing
    _assert_close(found, expected)


def _by_hand(model: PeftModel, inputs: dict[str, torch.Tensor], coefficient: float) -> dict[str, torch.Tensor]:
    """d (main loss + coefficient * sum of each layer's balance loss), with each layer's input taken as given."""
    states: list[torch.Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, SpartanLayer)]
    handles = [
        layer.spartan_memory["default"].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        for layer in layers
    ]
    for layer in layers:
        layer.load_balancing_coef["default"] = 0.0
    model.zero_grad()
    loss = model(**inputs).loss
    for layer, x in zip(layers, states, strict=True):
        memory = layer.spartan_memory["default"]
        mask = inputs.get("attention_mask")
        if layer.is_decoder:
            mask = inputs.get("decoder_attention_mask")
        loss = loss + coefficient * load_balancing_loss(x, memory.parent_keys, top_k=memory.top_k, mask=mask)
    loss.backward()
    for layer in layers:
        layer.load_balancing_coef["default"] = coefficient
    for handle in handles:
        handle.remove()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
def test_the_balance_loss_is_added_to_the_main_one(name: str, use_reentrant: bool | None) -> None:
    inputs = _inputs(name)
    model = _model(name, load_balancing_coef=3.0)
    _checkpoint(model, use_reentrant)
    found = _gradients(model, inputs)
    plain = _model(name, load_balancing_coef=3.0)
    _assert_close(found, _by_hand(plain, inputs, 3.0))
    without = _gradients(_model(name), inputs)
    parents = [n for n in found if n.endswith("parent_keys")]
    assert parents
    assert all((found[n] - without[n]).abs().max() > 1e-3 * without[n].abs().max() for n in parents)


@KINDS
def test_it_follows_the_scaling_of_gradient_accumulation(use_reentrant: bool | None) -> None:
    inputs = _inputs("bert")
    model = _model("bert", load_balancing_coef=2.0)
    expected = _gradients(model, inputs)
    _checkpoint(model, use_reentrant)
    _assert_close({n: 4 * g for n, g in _gradients(model, inputs, scale=0.25).items()}, expected)
    model.zero_grad()
    for _ in range(4):
        (model(**inputs).loss / 4).backward()
    _assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@KINDS
def test_a_loss_computed_outside_the_model_gets_the_balance_loss_too(use_reentrant: bool | None) -> None:
    inputs = _inputs("bert")
    expected = _gradients(_model("bert", load_balancing_coef=2.0), inputs)
    model = _model("bert", load_balancing_coef=2.0)
    _checkpoint(model, use_reentrant)
    inputs.pop("labels")
    nn.functional.cross_entropy(model(**inputs).logits, LABELS).backward()
    _assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@KINDS
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padding_never_counts(name: str, use_reentrant: bool | None) -> None:
    """Parents see the same balance loss however much padding stands behind the text."""
    inputs = _inputs(name)
    padded = {}
    for key, value in inputs.items():
        is_text = value.dim() == 2 and key in ("input_ids", "attention_mask")
        padded[key] = nn.functional.pad(value, (0, 4)) if is_text else value

    def balance_gradients(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model, plain = _model(name, load_balancing_coef=2.0), _model(name)
        _checkpoint(model, use_reentrant)
        with_loss, without = _gradients(model, given), _gradients(plain, given)
        return {n: with_loss[n] - without[n] for n in with_loss if n.endswith("parent_keys")}

    _assert_close(balance_gradients(padded), balance_gradients(inputs))


def test_the_loss_is_one_for_even_use_and_leaves_out_masked_positions() -> None:
    keys = torch.eye(4)
    even = 20 * torch.eye(4).unsqueeze(0)  # each parent is chosen by one position
    assert load_balancing_loss(even, keys, top_k=1).item() == pytest.approx(1.0, abs=1e-4)
    same = even[:, :1].expand(1, 4, 4)
    assert load_balancing_loss(same, keys, top_k=1).item() == pytest.approx(4.0, abs=1e-3)
    mask = torch.tensor([[1, 1, 0, 0]])
    noise = torch.cat([even[:, :2], torch.randn(1, 2, 4)], 1)
    expected = load_balancing_loss(even[:, :2], keys, top_k=1)
    torch.testing.assert_close(load_balancing_loss(noise, keys, top_k=1, mask=mask), expected)
    assert load_balancing_loss(even, keys, top_k=1, mask=torch.zeros(1, 4)).item() == 0


def test_without_gradients_the_balance_loss_costs_nothing_and_fails_nothing() -> None:
    inputs = _inputs("bert")
    model = _model("bert", load_balancing_coef=2.0)
    with torch.no_grad():
        in_training = model(**inputs)
    assert not in_training.loss.requires_grad
    plain = _model("bert")
    with torch.no_grad():
        assert torch.equal(in_training.logits, plain(**inputs).logits)
    _assert_close(_gradients(model, inputs), _by_hand(model, inputs, 2.0))


def test_evaluation_between_forward_and_backward_does_not_disturb_it() -> None:
    inputs = _inputs("bert")
    model = _model("bert", load_balancing_coef=2.0)
    expected = _gradients(model, inputs, scale=0.5)
    model.zero_grad()
    loss = model(**inputs).loss * 0.5
    with torch.no_grad():
        model(**ARCHITECTURES["bert"].inputs(batch=2, length=5))
    loss.backward()
    _assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_unloading_stops_watching_the_model() -> None:
    backbone = build("bert")
    before = len(backbone._forward_hooks), len(backbone._forward_pre_hooks)
    model = get_peft_model(backbone, SpartanConfig(**SMALL, load_balancing_coef=1.0))
    assert (len(backbone._forward_hooks), len(backbone._forward_pre_hooks)) != before
    model.unload()
    assert (len(backbone._forward_hooks), len(backbone._forward_pre_hooks)) == before
