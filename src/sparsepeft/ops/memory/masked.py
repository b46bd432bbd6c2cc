"""Dense form: two matrix products over the whole memory, unselected parents weighted zero."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.memory.select import softmax_dtype, top_k_lowest_index

# Up to here a batch is so small that time goes into reading the memory, not into arithmetic.
_FEW_TOKENS = 128


def memory_read_masked(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory with dense matrix products; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D). Cost grows with P * C, whatever K is.
    """
    num_parents, num_children, hidden = child_keys.shape
    precise = softmax_dtype(x.dtype)
    tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # the number of tokens is open then
    if not tracing and x.shape[0] <= _FEW_TOKENS:
        # Copying keys and values into one matrix would cost more than the products themselves.
        parent_scores = torch.mm(x, parent_keys.T).to(precise)
        child_scores = torch.mm(x, child_keys.reshape(-1, hidden).T).to(precise).unflatten(-1, child_keys.shape[:2])
        values, child_dim = child_values.reshape(-1, hidden), 2
    else:
        # Children are laid out child-major, (C, P): a softmax over a leading dimension of 3 runs vectorised along the
        # parents, over a last dimension of 3 it does not (0.1 against 2.2 ms at 4096 tokens, P=16, C=3).
        keys = torch.cat([parent_keys, child_keys.transpose(0, 1).reshape(-1, hidden)])  # (P + C*P, D)
        scores = torch.mm(x, keys.T).to(precise)
        parent_scores, child_scores = scores.split([num_parents, num_children * num_parents], dim=-1)
        child_scores = child_scores.unflatten(-1, (num_children, num_parents))
        values, child_dim = child_values.transpose(0, 1).reshape(-1, hidden), 1  # (C*P, D)

    if top_k == num_parents:
        gate = torch.softmax(parent_scores, dim=-1)
    else:
        # Renormalising a softmax over the selected parents is the softmax of the selected scores.
        best, selected = top_k_lowest_index(parent_scores, top_k)
        gate = torch.zeros_like(parent_scores).scatter(-1, selected, torch.softmax(best, dim=-1))  # (N, P)

    if temperature != 1.0:
        child_scores = child_scores / temperature
    attention = torch.softmax(child_scores, dim=child_dim)  # (N, P, C) or (N, C, P)
    weights = (gate.unsqueeze(child_dim) * attention).flatten(1).to(x.dtype)
    return torch.addmm(x, weights, values)
