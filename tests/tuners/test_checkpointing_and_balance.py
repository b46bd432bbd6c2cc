"""Gradients: under both kinds of gradient checkpointing, with and without the load-balancing loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models import (
    ARCHITECTURES,
    METHODS,
    SMALL,
    adapted,
    assert_gradients_close,
    build,
    checkpoint,
    gradients,
    labelled_inputs,
    run,
    task_layers,
    without_dropout,
)
from torch import nn
from transformers import LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from sparsepeft import SpartanConfig, SptConfig, sparsify
from sparsepeft.layers import ProductKeyMemory, SparseMemory
from sparsepeft.models import auxiliary_loss
from sparsepeft.models.blocks import find_blocks, is_norm
from sparsepeft.ops.load_balancing import load_balancing_loss, product_load_balancing_loss
from sparsepeft.tuners.spartan import SpartanLayer

KINDS = pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])


def _model(name: str, **config) -> PeftModel:
    return adapted(without_dropout(build(name)), **config).train()


def _gradients_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_without_checkpointing(method: str, name: str, use_reentrant: bool) -> None:
    inputs = labelled_inputs(name)
    expected = gradients(_model(name, config=METHODS[method]()), inputs)
    model = _model(name, config=METHODS[method]())
    checkpoint(model, use_reentrant)
    runs = []
    layer = task_layers(model)[1]  # below the first memory there is no backward pass, so nothing is computed again
    inner = next(module for module in layer.base_layer.modules() if "Norm" in type(module).__name__)
    inner.register_forward_hook(lambda *args: runs.append(1))
    model(**inputs)
    once = len(runs)
    found = gradients(model, inputs)
    assert len(runs) == 3 * once  # or nothing was computed again, and the test shows nothing
    assert_gradients_close(found, expected)
    # Nothing is left behind that a copy could not take: without reentrance the second forward pass stops early.
    bare = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(run(copy.deepcopy(model).eval(), bare), run(model.eval(), bare))


def _hooks_of(model: PeftModel) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("kind", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_no_backward_pass_below_the_lowest_adapter_unless_checkpoints_are_reentrant(
    name: str, kwargs: dict[str, bool] | None, kind: str
) -> None:
    inputs = labelled_inputs(name)
    model = _model(name, layers_to_transform=[1])
    expected, before = gradients(model, inputs), _hooks_of(model)
    for given in ({"use_reentrant": True}, kwargs, kwargs):
        getattr(model, f"{kind}_enable")(**{f"{kind}_kwargs": given})
    below, above = find_blocks(model)[0].module, find_blocks(model)[2].module
    reached = []
    handles = [
        norm.register_full_backward_hook(lambda module, *args: reached.append(module))
        for norm in (module for layer in (below, above) for module in layer.modules() if is_norm(module))
    ]
    assert_gradients_close(gradients(model, inputs), expected)
    assert any(module in set(above.modules()) for module in reached)
    is_reentrant = kwargs is not None and kwargs.get("use_reentrant", True)
    assert any(module in set(below.modules()) for module in reached) == is_reentrant
    for handle in handles:
        handle.remove()
    getattr(model, f"{kind}_disable")()
    assert _hooks_of(model) == before
    assert_gradients_close(gradients(model, inputs), expected)


def _balance(memory: SparseMemory, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if isinstance(memory, ProductKeyMemory):
        return product_load_balancing_loss(x, memory.first_keys, memory.second_keys, top_k=memory.top_k, mask=mask)
    return load_balancing_loss(x, memory.parent_keys, top_k=memory.top_k, mask=mask)


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
        loss = loss + coefficient * _balance(memory, x, mask)
    loss.backward()
    for layer in layers:
        layer.load_balancing_coef["default"] = coefficient
    for handle in handles:
        handle.remove()
    return _gradients_of(model)


@KINDS
@pytest.mark.parametrize(
    ("name", "parents"),
    [("bert", {}), ("llama", {}), ("bart", {}), ("bert", {"parent_keys": "product", "num_parents": 9})],
)
def test_the_balance_loss_is_added_to_the_main_one(
    name: str, parents: dict[str, Any], use_reentrant: bool | None
) -> None:
    inputs = labelled_inputs(name)
    model = _model(name, load_balancing_coef=3.0, **parents)
    checkpoint(model, use_reentrant)
    found = gradients(model, inputs)
    plain = _model(name, load_balancing_coef=3.0, **parents)
    assert_gradients_close(found, _by_hand(plain, inputs, 3.0))
    without = gradients(_model(name, **parents), inputs)
    keys = [n for n in found if n.endswith(("parent_keys", "first_keys", "second_keys"))]
    assert keys
    assert all((found[n] - without[n]).abs().max() > 1e-3 * without[n].abs().max() for n in keys)


@KINDS
def test_it_follows_the_scaling_of_gradient_accumulation(use_reentrant: bool | None) -> None:
    inputs = labelled_inputs("bert")
    model = _model("bert", load_balancing_coef=2.0)
    expected = gradients(model, inputs)
    checkpoint(model, use_reentrant)
    assert_gradients_close({n: 4 * g for n, g in gradients(model, inputs, scale=0.25).items()}, expected)
    model.zero_grad()
    for _ in range(4):
        (model(**inputs).loss / 4).backward()
    assert_gradients_close(_gradients_of(model), expected)


def _mean(model: nn.Module, inputs: dict, num_items: int) -> torch.Tensor:
    """In the model, as a mean over the pass, which Trainer divides by the number of passes."""
    return model(**inputs).loss * _items(model, inputs) / num_items


def _sum(model: nn.Module, inputs: dict, num_items: int) -> torch.Tensor:
    """In the model, by models that use ``num_items_in_batch``; BERT's takes it and computes a mean."""
    loss = model(**inputs, num_items_in_batch=torch.tensor(num_items)).loss
    return loss if _shifts(model) else loss * _items(model, inputs) / num_items


def _outside(model: nn.Module, inputs: dict, num_items: int) -> torch.Tensor:
    """``compute_loss_func``, and float16's large factor."""
    logits, labels = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    if _shifts(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items
    return loss * 1024


def _smoothed(model: nn.Module, inputs: dict, num_items: int) -> torch.Tensor:
    """``label_smoothing_factor``."""
    output = model(**{k: v for k, v in inputs.items() if k != "labels"}, num_items_in_batch=torch.tensor(num_items))
    return LabelSmoother(0.1)(output, inputs["labels"], _shifts(model), num_items)


def _shifts(model: PeftModel) -> bool:
    return isinstance(model.get_base_model(), LlamaForCausalLM)


def _items(model: PeftModel, inputs: dict) -> int:
    return int((inputs["labels"][..., 1:] if _shifts(model) else inputs["labels"]).ne(-100).sum())


def _accumulated(model: nn.Module, passes: list[dict], compute_loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    num_items = sum(_items(model, inputs) for inputs in passes)
    for inputs in passes:
        compute_loss(model, inputs, num_items).backward()
    return _gradients_of(model)


def _sparse(name: str) -> PeftModel:
    backbone = without_dropout(build(name))
    ids = ARCHITECTURES[name].inputs()["input_ids"]
    config = SptConfig(attention=False, values="routed", load_balancing_coef=2.0)
    lora = LoraConfig(target_modules=["query", "q_proj"], task_type={"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[name])
    return get_peft_model(sparsify(backbone, config, calibration_data=ids), lora).train()


@pytest.mark.parametrize("compute_loss", [_mean, _sum, _outside, _smoothed])
@pytest.mark.parametrize(("kind", "name"), [("SPARTAN", "bert"), ("checkpointed SPARTAN", "llama"), ("SPT", "llama")])
def test_it_is_as_strong_as_the_main_loss_in_each_accumulated_pass(kind: str, name: str, compute_loss) -> None:
    """Rows that are all alike give the same gradients in one pass as in several, of whatever sizes."""
    torch.manual_seed(0)
    model = _sparse(name) if kind == "SPT" else _model(name, load_balancing_coef=2.0)
    checkpoint(model, use_reentrant=True if kind == "checkpointed SPARTAN" else None)
    row = {key: value[:1] for key, value in labelled_inputs(name).items()}
    parts = [{key: value.expand(rows, *value.shape[1:]) for key, value in row.items()} for rows in (4, 1, 3)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in row}
    expected = _accumulated(model, [whole], compute_loss)
    assert_gradients_close(_accumulated(model, parts, compute_loss), expected)
    if compute_loss is not _smoothed:  # and where the weight is read off exactly, it is that of the loss in the model
        scale = 1024 if compute_loss is _outside else 1
        by_mean = _accumulated(model, [whole], _mean)
        assert_gradients_close(expected, {n: g * scale for n, g in by_mean.items()})


def test_the_weight_of_a_cross_entropy_is_read_off_its_gradient(monkeypatch) -> None:
    monkeypatch.setattr(auxiliary_loss, "_CHUNK", 20)  # so that several chunks are read
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(7, (2, 5)).masked_fill(torch.rand(2, 5) < 0.3, -100)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 40
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = labels.ne(-100).sum() / 40
    torch.testing.assert_close(auxiliary_loss.cross_entropy_weight(logits, gradient), expected)
    assert auxiliary_loss.cross_entropy_weight(torch.randn(3, 1), torch.randn(3, 1)) is None  # a regression


@KINDS
@pytest.mark.parametrize(
    ("name", "left_out"), [("bert", ()), ("t5", ("decoder_input_ids",)), ("bart", ("decoder_input_ids",))]
)
def test_padding_never_counts(name: str, left_out: tuple[str, ...], use_reentrant: bool | None) -> None:
    """Parents see the same balance loss however much padding stands behind the text, or behind labels alone."""
    inputs = {key: value for key, value in labelled_inputs(name).items() if key not in left_out}
    padding = {"input_ids": 0, "attention_mask": 0} | ({"labels": -100} if left_out else {})
    padded = {k: nn.functional.pad(v, (0, 4), value=padding[k]) if k in padding else v for k, v in inputs.items()}

    def balance_gradients(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model, plain = _model(name, load_balancing_coef=2.0), _model(name)
        checkpoint(model, use_reentrant)
        with_loss, without = gradients(model, given), gradients(plain, given)
        return {n: with_loss[n] - without[n] for n in with_loss if n.endswith("parent_keys")}

    assert_gradients_close(balance_gradients(padded), balance_gradients(inputs))


def test_passes_without_gradients_cost_and_disturb_nothing() -> None:
    inputs = labelled_inputs("bert")
    model = _model("bert", load_balancing_coef=2.0)
    expected = gradients(model, inputs, scale=0.5)
    model.zero_grad()
    loss = model(**inputs).loss * 0.5
    with torch.no_grad():  # between forward and backward
        in_training = model(**inputs)
        assert not in_training.loss.requires_grad
        assert torch.equal(in_training.logits, _model("bert")(**inputs).logits)
        model(**ARCHITECTURES["bert"].inputs(batch=2, length=5))
    loss.backward()
    assert_gradients_close(_gradients_of(model), expected)


def test_unloading_stops_watching_the_model() -> None:
    backbone = build("bert")
    before = len(backbone._forward_hooks), len(backbone._forward_pre_hooks)
    model = get_peft_model(backbone, SpartanConfig(**SMALL, load_balancing_coef=1.0))
    assert (len(backbone._forward_hooks), len(backbone._forward_pre_hooks)) != before
    model.unload()
    assert (len(backbone._forward_hooks), len(backbone._forward_pre_hooks)) == before


@pytest.mark.parametrize("trained", ["parent_keys", "child_keys", "child_values"])
def test_a_part_of_the_memory_can_be_trained_alone(trained: str) -> None:
    model = _model("bert")
    expected = gradients(model, labelled_inputs("bert"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    found = gradients(model, labelled_inputs("bert"))
    assert len(found) == len(task_layers(model))
    assert_gradients_close(found, {name: gradient for name, gradient in expected.items() if name.endswith(trained)})
