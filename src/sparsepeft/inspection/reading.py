"""What a memory does at each position, from its own parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepeft.layers import SparseMemory
from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index

# Positions are read so many at a time that the scores of their parents and children have at most this many entries.
_ENTRIES = 1 << 22


class Reading(NamedTuple):
    """N positions' reading of a memory; K parents each, the one with the highest score first.

    Attributes:
        parents: the parents picked, (N, K).
        gates: their renormalised weights, (N, K).
        children: the child picked most under each, (N, K).
        moved: the norm of what each adds, over the norm of the state, (N, K).
        moved_total: the norm of what all add together, over the norm of the state, (N,).
    """

    parents: Tensor
    gates: Tensor
    children: Tensor
    moved: Tensor
    moved_total: Tensor


def read(memory: SparseMemory, states: Tensor) -> Iterator[tuple[slice, Reading]]:
    """How ``memory`` is read by ``states``, a bounded number of them at a time.

    Args:
        memory: the memory.
        states: the hidden states it is read with, (N, D).

    Yields:
        Which rows, and their :class:`Reading`.
    """
    num_parents, num_children, _ = memory.child_keys.shape
    rows = max(1, _ENTRIES // max(num_parents, memory.top_k * num_children))
    for start in range(0, len(states), rows):
        yield slice(start, start + rows), _read(memory, states[start : start + rows])


def _read(memory: SparseMemory, states: Tensor) -> Reading:
    # The dtypes of ops.memory_read: products in the common dtype, softmaxes in float32 at least.
    dtype = torch.promote_types(states.dtype, memory.parent_keys.dtype)
    x, parent_keys, child_keys, child_values = (
        tensor.to(dtype) for tensor in (states, memory.parent_keys, memory.child_keys, memory.child_values)
    )
    precise = softmax_dtype(dtype)
    scores, parents = top_k_lowest_index((x @ parent_keys.T).to(precise), memory.top_k)
    # By index, then stably by score: of equal scores the lowest index comes first.
    by_index = parents.argsort(-1)
    order = by_index.gather(-1, scores.gather(-1, by_index).argsort(dim=-1, descending=True, stable=True))
    scores, parents = scores.gather(-1, order), parents.gather(-1, order)
    gates = torch.softmax(scores, dim=-1)

    children, moved = torch.zeros_like(parents), torch.zeros_like(gates)
    total = torch.zeros(x.shape, dtype=precise, device=x.device)
    pairs = parents.flatten().argsort(stable=True)  # position * K + slot, grouped by parent
    for group in pairs.split(parents.flatten().bincount(minlength=len(parent_keys)).tolist()):
        if not len(group):
            continue
        parent, positions = parents.flatten()[group[0]], group // memory.top_k
        attention = torch.softmax((x[positions] @ child_keys[parent].T).to(precise) / memory.temperature, dim=-1)
        added = gates.flatten()[group, None] * (attention @ child_values[parent].to(precise))
        children.view(-1)[group] = attention.argmax(-1)
        moved.view(-1)[group] = added.norm(dim=-1)
        total.index_add_(0, positions, added)
    norms = x.to(precise).norm(dim=-1).clamp_min(torch.finfo(precise).tiny)
    return Reading(parents, gates, children, moved / norms[:, None], total.norm(dim=-1) / norms)
