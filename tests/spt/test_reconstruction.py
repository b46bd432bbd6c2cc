"""A low-rank update of a routed FFN learns to give the dense output back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.spt.models import TARGETS, build, inputs, logits, sparse

from sparsepeft.layers.compensation import held_out
from sparsepeft.layers.router import InitialRouter, compensated, inner_states, projection_of, start_from_outputs
from sparsepeft.models.sublayers import find_feed_forwards
from sparsepeft.ops.routed_ffn import project
from sparsepeft.spt import SptConfig, desparsify, load_sparse, save_sparse, sparsification, sparsify
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.reconstruction import reconstruct

CONFIG = SptConfig(
    attention=False, values="routed", num_blocks=4, num_active_blocks=2, reconstruction_steps=60, reconstruction_rank=4
)


def made(name: str, **values: Any) -> Any:
    settings = {"attention": False, "values": "routed", "reconstruction_steps": 60, "reconstruction_rank": 4}
    return sparse(name, "left", 40, **settings | values)


def updates(model: Any) -> list[Any]:
    return [routed.spt_router.current.updates for _, routed in sparsification(model).feed_forwards]


def start_of(name: str, num_tokens: int = 603) -> tuple[Any, InitialRouter, torch.Tensor, torch.Tensor]:
    """An FFN, a router without reconstruction, and the tokens that it was made from."""
    feed_forward = find_feed_forwards(build(name))[0]
    hidden, size = feed_forward.sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 5, generator=generator) @ torch.randn(5, hidden, generator=generator)  # can be learnt
    inner = inner_states(feed_forward, x)
    start = start_from_outputs(feed_forward, torch.randperm(size, generator=generator), 4, x, inner)
    return feed_forward, start, x, inner


@pytest.mark.parametrize("name", TARGETS)
def test_new_tokens_come_closer_to_the_dense_output(name: str) -> None:
    feed_forward, start, x, inner = start_of(name, 1203)
    x, inner, new, expected = x[:1000], inner[:1000], x[1000:], inner[1000:]
    start = compensated(feed_forward, start, 2, 4, x, inner)
    better = reconstruct(feed_forward, start, CONFIG, x, inner)
    assert set(better.updates or {}) == ({"up", "down", "gate"} if feed_forward.names.gate else {"up", "down"})
    assert better.weight is start.weight or torch.equal(better.weight, start.weight)
    dense = project(expected, projection_of(feed_forward, feed_forward.names.down))
    errors = []
    for each in (start, better):  # the layer itself, which has the update among LoRA's
        layer = RoutedFeedForward(find_feed_forwards(build(name))[0], each, CONFIG, SparseContext(CONFIG)).eval()
        with torch.no_grad():
            errors.append(float((layer(new) - dense).norm()))
    assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same() -> None:
    arguments = start_of("llama")
    config = SptConfig(**vars(CONFIG) | {"reconstruction_steps": 5})
    random = torch.get_rng_state()
    first, second = (reconstruct(arguments[0], arguments[1], config, *arguments[2:]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])
        assert not tensor.requires_grad


def test_what_does_not_help_held_out_tokens_is_not_kept() -> None:
    feed_forward, start, x, inner = start_of("llama", 8)
    contrary = torch.where(held_out(8, x.device)[:, None], -inner, 3 * inner)
    assert reconstruct(feed_forward, start, CONFIG, x, contrary) is start
    assert reconstruct(feed_forward, start, CONFIG, x, inner * torch.nan) is start
    with pytest.raises(ValueError, match="from 1 tokens"):
        reconstruct(feed_forward, start, CONFIG, x[:1], inner[:1])


# -- in a model ---------------------------------------------------------------------------------


def test_every_ffn_comes_closer_and_says_what_it_costs() -> None:
    plain, better = (sparsification(made("llama", reconstruction_rank=rank)).report for rank in (0, 4))
    for layer, error in plain.feed_forward_error.items():
        assert better.feed_forward_error[layer] < error
    more = better.feed_forward_operations - plain.feed_forward_operations
    assert more == pytest.approx(3 * 4 * (32 + 64 / 2) / (3 * 32 * 64))  # three updates of rank 4, of half the neurons


@pytest.mark.parametrize("values", [{"reconstruction_steps": 0}, {"num_active_blocks": 4}])
def test_without_steps_or_without_blocks_left_out_there_is_no_update(values: dict[str, int]) -> None:
    assert updates(made("llama", **values)) == [{}, {}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = sparsify(build("llama").to(dtype), CONFIG, inputs("llama", batch=40))
    given = inputs("llama")
    answer = model.train()(**given, labels=given["input_ids"])
    answer.loss.backward()
    assert answer.logits.dtype == dtype
    for update in updates(model):
        assert update["gate"].up.dtype == torch.float32
        assert update["gate"].up.grad.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_trained_and_saved_with_each_adapter(name: str, tmp_path: Path) -> None:
    before = build(name).state_dict()
    model = get_peft_model(made(name, compensation_rank=2), LoraConfig(target_modules=TARGETS[name], r=2))
    given = inputs(name)
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    with torch.no_grad():
        for update in updates(model):
            assert update
            for low in update.values():
                for tensor in (low.down, low.up):
                    assert tensor.grad.abs().sum() > 0
                    tensor.sub_(tensor.grad)
    expected = logits(model.eval(), name)
    model.save_pretrained(str(tmp_path))
    again = load_sparse(build(name), tmp_path)
    torch.testing.assert_close(logits(again, name), expected, rtol=0, atol=0)
    with model.disable_adapter():
        assert not torch.equal(logits(model, name), expected)
    after = desparsify(model.unload()).state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_saved_without_an_adapter(tmp_path: Path) -> None:
    model = made("llama")
    save_sparse(model, tmp_path)
    again = load_sparse(build("llama"), tmp_path)
    assert updates(again)[0].keys() == {"gate", "up", "down"}
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"), rtol=0, atol=0)


def test_it_needs_calibration() -> None:
    with pytest.raises(ValueError, match="reconstruction_rank=4 needs calibration_data"):
        sparsify(build("llama"), CONFIG)
