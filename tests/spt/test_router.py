"""Where routers start from, and the blocks of neurons that they choose."""

from __future__ import annotations

import pytest
import torch
from tests.spt.models import TARGETS, build, inputs

from sparsepeft.layers.router import (
    activity,
    inner_states,
    start_from_outputs,
    start_from_weights,
)
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.ops.routed_ffn.clustering import assign_evenly, clustered_order
from sparsepeft.spt import SptConfig, sparsification, sparsify


def dense(feed_forward: FeedForward, x: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """What some neurons add to the output."""
    names = feed_forward.names

    def linear(name: str, given: torch.Tensor) -> torch.Tensor:
        return feed_forward.part(name)(given)

    inner = feed_forward.activation(linear(names.gate or names.up, x))
    inner = inner if names.gate is None else inner * linear(names.up, x)
    kept = torch.zeros_like(inner)
    kept[:, neurons] = inner[:, neurons]
    return linear(names.down, kept) - linear(names.down, torch.zeros_like(inner))


@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_the_regression_predicts_how_much_blocks_add(name: str) -> None:
    feed_forward = find_feed_forwards(build(name))[0]
    hidden, size = feed_forward.sizes
    x = torch.randn(400, hidden, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    start = start_from_outputs(feed_forward, order, 4, x[:300], inner_states(feed_forward, x[:300]))
    added = torch.stack([dense(feed_forward, x, block).norm(dim=1) for block in order.chunk(4)], dim=1).log()
    predicted = x @ start.weight.T + start.bias
    torch.testing.assert_close(predicted[:300].mean(0), added[:300].mean(0), rtol=1e-3, atol=1e-3)
    held_out, errors = added[300:], (predicted - added)[300:]
    assert errors.square().mean() < (held_out - added[:300].mean(0)).square().mean()


@pytest.mark.parametrize("name", TARGETS)
def test_neurons_that_fire_alike_are_alike(name: str) -> None:
    feed_forward = find_feed_forwards(build(name))[0]
    names, (hidden, size) = feed_forward.names, feed_forward.sizes
    with torch.no_grad():
        for part in (names.gate, names.up):
            if part is not None:
                module = feed_forward.part(part)
                weight = module.weight if module.weight.shape == (size, hidden) else module.weight.T
                weight[1] = weight[0]
                if module.bias is not None:
                    module.bias[1] = module.bias[0]
    features = activity(feed_forward, inner_states(feed_forward, torch.randn(50, hidden)), seed=0)
    assert features.shape == (size, 50)
    alike = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    assert alike[0] == pytest.approx(1.0, abs=1e-4)
    assert alike[1:].max() < 0.99


def test_without_calibration_the_weights_decide() -> None:
    model = build("llama")
    rows = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
    sparsify(model, SptConfig(attention=False, values="routed", num_blocks=4, num_active_blocks=2))
    router = sparsification(model).feed_forwards[0][1].spt_router.current
    torch.testing.assert_close(router.weight, rows[router.neuron_order].view(4, -1, 32).mean(1))
    feed_forward = find_feed_forwards(build("llama"))[0]
    start = start_from_weights(feed_forward, router.neuron_order, 4)
    assert torch.equal(start.weight, router.weight)


def test_padding_has_no_part_in_calibration() -> None:
    found, codebooks = [], []
    for token in (0, 7):
        given = inputs("llama", padding="right")
        given["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], token)
        model = sparsify(build("llama"), SptConfig(values="routed", num_blocks=4, num_active_blocks=2), given)
        found.append(sparsification(model).feed_forwards[0][1].spt_router.current)
        codebooks.append(model.model.layers[0].self_attn.spt.state.current.codebooks)
    torch.testing.assert_close(*codebooks)
    torch.testing.assert_close(found[0].weight, found[1].weight)
    assert torch.equal(found[0].neuron_order, found[1].neuron_order)


# -- blocks of equal size from neurons' weights --


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(4, 16)
    planted = torch.arange(4).repeat(6)[torch.randperm(24, generator=generator)]
    lengths = 0.5 + torch.rand(24, 1, generator=generator)
    rows = lengths * (directions[planted] + 0.1 * torch.randn(24, 16, generator=generator))
    order = clustered_order(rows, 4, seed=0)
    assert sorted(order.tolist()) == list(range(24))
    blocks = planted[order].view(4, 6)
    assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize(("members", "clusters"), [(1, 1), (6, 3), (40, 8), (9, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_even_assignment(members: int, clusters: int, seed: int) -> None:
    distances = torch.rand(members, clusters, generator=torch.Generator().manual_seed(seed))
    labels = assign_evenly(distances)
    assert torch.bincount(labels, minlength=clusters).tolist() == [members // clusters] * clusters


def test_all_want_the_same() -> None:
    distances = torch.tensor([[0.1, 1.0], [0.2, 1.0], [0.3, 5.0], [0.4, 2.0]])
    assert assign_evenly(distances).tolist() == [0, 0, 1, 1]


def test_rows_of_zeros_and_equal_rows() -> None:
    for rows in (torch.zeros(8, 4), torch.ones(8, 4)):
        order = clustered_order(rows, 4, seed=0)
        assert sorted(order.tolist()) == list(range(8))
