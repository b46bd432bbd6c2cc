"""A linear map stands in for the blocks of an FFN that a token does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.spt.models import TARGETS, build, inputs, logits, sparse

from sparsepeft.layers.compensation import fit_compensation
from sparsepeft.spt import SptConfig, load_sparse, save_sparse, sparsification, sparsify


def made(name: str, rank: int, active: int = 1) -> Any:
    return sparse(name, "left", 40, attention=False, num_active_blocks=active, compensation_rank=rank)


def compensations(model: Any) -> list[Any]:
    return [routed.spt_router.current.compensation for _, routed in sparsification(model).feed_forwards]


# -- the fit ---------------------------------------------------------------------------------


def test_a_map_of_that_rank_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, down, up, bias = (torch.randn(size, generator=generator) for size in ((400, 12), (3, 12), (12, 3), (12,)))
    missing = inputs @ down.T @ up.T + bias
    found = fit_compensation(inputs + 2, missing, rank=3)  # inputs whose mean is not zero
    assert [tuple(tensor.shape) for tensor in found] == [(3, 12), (12, 3), (12,)]
    assert (found(inputs + 2) - missing).norm() < 0.01 * missing.norm()
    torch.testing.assert_close(found.down.norm(dim=1), found.up.norm(dim=0))
    errors = [(fit_compensation(inputs, missing, rank)(inputs) - missing).norm() for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_what_would_not_help_elsewhere_is_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, missing = (torch.randn(60, 40, generator=generator) for _ in range(2))
    found = fit_compensation(inputs, missing, rank=8)
    assert not found(inputs).any()
    assert found.down.any()  # or neither factor would ever have a gradient


def test_a_rank_above_the_width_is_the_whole_map() -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = fit_compensation(inputs, inputs.flip(1), rank=9)
    assert (found(inputs) - inputs.flip(1)).norm() < 0.01 * inputs.norm()


# -- in a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_every_ffn_comes_closer_to_the_dense_one(name: str) -> None:
    models = [made(name, rank) for rank in (0, 8)]
    plain, better = (sparsification(model).report for model in models)
    assert plain.feed_forward_error.keys() == better.feed_forward_error.keys()
    for layer, error in plain.feed_forward_error.items():
        assert better.feed_forward_error[layer] < error
    feed_forward = sparsification(models[0]).feed_forwards[0][0]
    products = (3 if feed_forward.names.gate else 2) * feed_forward.sizes[0] * feed_forward.sizes[1]
    more = better.feed_forward_operations - plain.feed_forward_operations
    assert more == pytest.approx(2 * 8 * 32 / products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    config = SptConfig(attention=False, values="routed", num_blocks=4, num_active_blocks=1, compensation_rank=4)
    model = sparsify(build("llama").to(dtype), config, inputs("llama", batch=40))
    assert model(**inputs("llama")).logits.dtype == dtype
    assert all(tensor.dtype == torch.float32 for found in compensations(model) for tensor in found)


def test_it_is_trained_and_saved_with_each_adapter(tmp_path: Path) -> None:
    model = get_peft_model(made("llama", rank=4), LoraConfig(target_modules=["q_proj"], r=2))
    given = inputs("llama")
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    for found in compensations(model):
        for tensor in found:
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0
            with torch.no_grad():
                tensor.sub_(tensor.grad)
    expected = logits(model.eval(), "llama")
    model.save_pretrained(str(tmp_path))
    again = load_sparse(build("llama"), tmp_path)
    torch.testing.assert_close(logits(again, "llama"), expected, rtol=0, atol=0)
    with model.disable_adapter():
        assert not torch.equal(logits(model, "llama"), expected)


@pytest.mark.parametrize("active", [1, 4])
def test_saved_without_an_adapter(active: int, tmp_path: Path) -> None:
    model = made("llama", rank=4, active=active)
    save_sparse(model, tmp_path)
    again = load_sparse(build("llama"), tmp_path)
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"), rtol=0, atol=0)
    assert sparsification(again).config.compensation_rank == 4
    if active == 4:  # with all blocks there is nothing to stand in for
        assert compensations(model) == [None, None]
        torch.testing.assert_close(logits(model, "llama"), logits(build("llama"), "llama"), atol=1e-4, rtol=1e-4)


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match="to 1 tokens"):
        sparsify(build("llama"), SptConfig(attention=False, values="routed", compensation_rank=4), torch.tensor([[5]]))
    with pytest.raises(ValueError, match="needs calibration_data"):
        sparsify(build("llama"), SptConfig(attention=False, values="routed", compensation_rank=4))
