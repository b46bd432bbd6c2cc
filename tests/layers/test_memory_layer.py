"""The memory as a module; what it computes is tested with the op."""

from __future__ import annotations

import pytest
import torch

from sparsepeft.layers import ProductKeyMemory, SparseMemory
from sparsepeft.ops import memory_read, product_memory_read


def test_it_reads_its_own_parameters() -> None:
    memory = SparseMemory(8, 5, 3, 2, temperature=1.6, value_initializer_range=1.0, initializer_range=1.0)
    states = torch.randn(2, 4, 8)
    expected = memory_read(
        states, memory.parent_keys, memory.child_keys, memory.child_values, top_k=2, temperature=1.6, impl="reference"
    )
    torch.testing.assert_close(memory(states), expected)
    assert not torch.allclose(memory(states), states)
    assert sum(p.numel() for p in memory.parameters()) == 5 * (1 + 2 * 3) * 8
    assert "hidden_size=8, num_parents=5, num_children=3, top_k=2" in repr(memory)
    with pytest.raises(ValueError, match=r"shape \(2, 7\).*width 8"):
        memory(torch.zeros(2, 7))


def test_product_keys_and_their_gradients() -> None:
    memory = ProductKeyMemory(9, 16, 3, 5, temperature=1.6, value_initializer_range=1.0, initializer_range=1.0)
    assert [tuple(p.shape) for p in memory.parameters()] == [(4, 5), (4, 4), (16, 3, 9), (16, 3, 9)]
    states, tables = torch.randn(2, 4, 9), list(memory.parameters())
    expected = product_memory_read(states, *tables, top_k=5, temperature=1.6, impl="reference")
    torch.testing.assert_close(memory(states), expected)
    scores, parents = memory.select(states.flatten(0, 1))
    keys = torch.cat([memory.first_keys[parents // 4], memory.second_keys[parents % 4]], -1)
    torch.testing.assert_close(scores, (keys * states.view(-1, 1, 9)).sum(-1))
    for each in (memory, SparseMemory(9, 16, 3, 5)):
        for sparse in (None, False, True):
            each.sparse_gradients = sparse
            each.zero_grad()
            each(states).sum().backward()
            assert each.child_values.grad.is_sparse == bool(sparse)
    assert "num_parents=16" in repr(memory)
    assert torch.equal(ProductKeyMemory(9, 16)(states), states)
    for sizes, message in (((8, 15), "num_parents=15 .* such as 9 or 16"), ((1, 16), "hidden_size=1")):
        with pytest.raises(ValueError, match=message):
            ProductKeyMemory(*sizes)


def test_fresh_it_is_the_identity_and_its_keys_are_spread_as_asked() -> None:
    memory = SparseMemory(64, 32, 16, 8, initializer_range=0.5)
    states = torch.randn(3, 64)
    assert torch.equal(memory(states), states)
    assert memory.child_keys.std().item() == pytest.approx(0.5, rel=0.05)
    assert memory.child_keys.mean().item() == pytest.approx(0.0, abs=0.02)


def test_without_storage_it_is_given_values_later() -> None:
    memory = SparseMemory(8, device=torch.device("meta"))
    assert all(p.device.type == "meta" for p in memory.parameters())
    memory.to_empty(device="cpu").reset_parameters()
    states = torch.randn(3, 8)
    assert torch.equal(memory(states), states)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"top_k": 6}, {"num_children": 0}, {"num_parents": 0}, {"temperature": 0.0}]
)
def test_wrong_sizes_are_refused(wrong: dict) -> None:
    sizes = {"num_parents": 5, "num_children": 3, "top_k": 2} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        SparseMemory(8, **sizes)
