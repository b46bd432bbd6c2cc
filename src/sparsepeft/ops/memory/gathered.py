"""Sparse form for exported graphs: plain gathers, no operator of our own and no control flow that depends on data."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.memory.select import softmax_dtype, top_k_lowest_index


def memory_read_gathered(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by gathering one selected parent after the other; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D).
    """
    precise = softmax_dtype(x.dtype)
    best, selected = top_k_lowest_index(torch.mm(x, parent_keys.T).to(precise), top_k)
    gate = torch.softmax(best, dim=-1)  # (N, K)
    output = x.to(precise)
    for rank in range(top_k):  # one at a time: the largest temporary is (N, C, D)
        scores = torch.matmul(child_keys[selected[:, rank]], x.unsqueeze(-1)).squeeze(-1).to(precise)  # (N, C)
        weights = gate[:, rank : rank + 1] * torch.softmax(scores / temperature, dim=-1)
        read = torch.matmul(weights.to(x.dtype).unsqueeze(1), child_values[selected[:, rank]])  # (N, 1, D)
        output = output + read.squeeze(1)
    return output.to(x.dtype)
