"""Blocks of equal size from neurons' weights."""

from __future__ import annotations

import pytest
import torch

from sparsepeft.spt.router import assign_evenly, clustered_order


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
