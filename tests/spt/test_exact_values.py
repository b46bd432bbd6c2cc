"""FFNs with exact values: the dense model's answers, loss and files; gradients through a part of the blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.spt.models import ALL, TARGETS, build, inputs, plain_name, sparse

from sparsepeft.spt import SptConfig, desparsify, load_sparse, sparsification, sparsify
from sparsepeft.spt.feed_forward import ExactFeedForward


def exact(name: str, num_active: int = 1, **settings: Any) -> Any:
    config = SptConfig(attention=False, num_blocks=4, num_active_blocks=num_active, **settings)
    return sparsify(build(name), config, inputs(name))


def with_lora(model: Any, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=TARGETS[name], r=2, init_lora_weights=False, **options))
    return model


def loss_of(model: Any, name: str) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs(name, padding=None)).logits
    return logits.float().log_softmax(-1)[..., 1].mean()


def gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    """By the dense model's names."""
    model.zero_grad()
    loss_of(model, name).backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    return {plain_name(key): grad for key, grad in found.items()}


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_answers_are_the_dense_models_bit_for_bit(name: str) -> None:
    given = inputs(name)
    dense = build(name)(**given).logits
    model = exact(name)
    assert all(isinstance(each, ExactFeedForward) for _, each in sparsification(model).feed_forwards)
    assert torch.equal(model(**given).logits, dense)
    assert torch.equal(desparsify(model.eval())(**given).logits, dense)


@pytest.mark.parametrize("name", TARGETS)
def test_loss_is_dense_and_with_all_blocks_the_gradients_are(name: str) -> None:
    dense = without_dropout(with_lora(build(name), name).train())
    expected = gradients(dense, name)
    for num_active in (4, 1):
        model = without_dropout(with_lora(exact(name, num_active), name).train())
        torch.testing.assert_close(loss_of(model, name), loss_of(dense, name), rtol=1e-4, atol=1e-4)
        actual = gradients(model, name)
        assert actual.keys() == expected.keys()
        errors = [(actual[key] - value).norm() / value.norm() for key, value in expected.items()]
        assert (max(errors) < 1e-3) == (num_active == 4), max(errors)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model = with_lora(exact(name), name, lora_dropout=0.1).train()
    torch.manual_seed(1)
    expected = gradients(model, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    actual = gradients(model, name)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_fits_the_dense_model_as_it_is(name: str, tmp_path: Path) -> None:
    model = with_lora(exact(name), name).eval()
    with torch.no_grad():
        expected = model(**inputs(name)).logits
    model.save_pretrained(tmp_path)
    assert not any("spt_router" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for load in (PeftModel.from_pretrained, load_sparse):  # warnings are errors
        again = load(build(name), tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs(name)).logits, expected)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(**inputs(name)).logits, expected)


def test_an_adapter_fits_the_dense_model_where_a_plan_left_all_attention_dense(tmp_path: Path) -> None:
    overrides = {f"model.layers.{index}.self_attn": {"dense": True} for index in range(2)}
    model = with_lora(sparse("llama", values="exact", overrides=overrides), "llama").eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path).eval()  # warnings are errors
    with torch.no_grad():
        assert torch.equal(again(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_models_own_files(name: str, tmp_path: Path) -> None:
    model = exact(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        expected = model(**inputs(name)).logits
    model.save_pretrained(tmp_path)
    again = load_sparse(type(model).from_pretrained(tmp_path), tmp_path)
    resumed = exact(name)
    resumed.load_state_dict(again.state_dict())
    for each in (type(model).from_pretrained(tmp_path), again, resumed):
        with torch.no_grad():
            assert torch.equal(each.eval()(**inputs(name)).logits, expected)


def test_autocast_keeps_masters_and_trains() -> None:
    model = with_lora(exact("llama", num_active=2), "llama").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, "llama")
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_report() -> None:
    report = sparsification(exact("llama", num_active=1)).report
    assert set(report.feed_forward_error.values()) == {0.0}
    assert report.feed_forward_operations == 1.0
    assert report.feed_forward_step_operations == pytest.approx((1 + 1 / 4) / 2)
