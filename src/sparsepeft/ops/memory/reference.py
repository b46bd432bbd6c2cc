"""SPARTAN's memory, equation for equation. The other implementations are tested against this one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype


def memory_read_reference(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by gathering the selected children of every token; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D). It materialises (N, K, C, D) twice: clear, and slow.
    """
    precise = softmax_dtype(x.dtype)

    # Eq. (1): a distribution over all parents, then the K best, renormalised.
    gate = torch.softmax((x @ parent_keys.T).to(precise), dim=-1)  # (N, P)
    # Sorting is stable, so of equally good parents the one with the lowest index is kept.
    selected = torch.sort((x @ parent_keys.T).to(precise), dim=-1, descending=True, stable=True).indices[:, :top_k]
    gate = gate.gather(-1, selected)  # (N, K)
    gate = gate / gate.sum(-1, keepdim=True)

    # Eq. (2): each selected parent attends to its own children.
    keys, values = child_keys[selected], child_values[selected]  # (N, K, C, D)
    scores = torch.einsum("nd,nkcd->nkc", x, keys).to(precise)
    attention = torch.softmax(scores / temperature, dim=-1)  # (N, K, C)

    # Eq. (3): the gated sum of what the parents read, added to the input.
    weights = (gate.unsqueeze(-1) * attention).to(x.dtype)
    return x + torch.einsum("nkc,nkcd->nd", weights, values)


def read_memory_by_memory(
    x: Tensor,
    memory_index: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    read: Callable[..., Tensor],
) -> Tensor:
    """Mixed batches as a loop: the rows of each memory call ``read(rows, parent_keys, child_keys, child_values)``.

    Shapes as for :func:`memory_read_mixed`. It looks which memories occur, and so waits for a GPU.
    """
    output = x.clone()
    for memory in memory_index.unique().tolist():
        if memory >= 0:
            rows = (memory_index == memory).nonzero()[:, 0]
            rows_read = read(x[rows], parent_keys[memory], child_keys[memory], child_values[memory])
            output = output.index_copy(0, rows, rows_read)
    return output
