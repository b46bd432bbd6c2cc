"""Portable PyTorch. Dense: two matrix products over the whole memory, unselected parents weighted zero.

Gathered: the sparse form for exported graphs, with no operator of our own and no control flow that depends on data. The
sparse form for everything else has a file of its own, ``pytorch_selected.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index

# Up to here a batch is so small that time goes into reading the memory, not into arithmetic.
_FEW_TOKENS = 128


def memory_read_dense(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory with dense matrix products; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D). Cost grows with P * C, whatever K is.
    """
    num_parents, num_children, hidden = child_keys.shape
    precise = softmax_dtype(x.dtype)
    tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # the number of tokens is open then
    if not tracing and x.shape[0] <= _FEW_TOKENS and x.dtype == precise:
        return _read_few(x, parent_keys, child_keys, child_values, top_k, temperature)

    # Children are laid out child-major, (C, P): a softmax over a leading dimension of 3 runs vectorised along the
    # parents, over a last dimension of 3 it does not (0.1 against 2.2 ms at 4096 tokens, P=16, C=3).
    keys = torch.cat([parent_keys, child_keys.transpose(0, 1).reshape(-1, hidden)])  # (P + C*P, D)
    values = child_values.transpose(0, 1).reshape(-1, hidden)  # (C*P, D)
    scores = torch.mm(x, keys.T).to(precise)
    parent_scores, child_scores = scores.split([num_parents, num_children * num_parents], dim=-1)
    child_scores = child_scores.unflatten(-1, (num_children, num_parents)) / temperature
    gate = _gate(parent_scores, top_k)
    weights = (gate.unsqueeze(1) * torch.softmax(child_scores, dim=1)).flatten(1).to(x.dtype)  # (N, C*P)
    return torch.addmm(x, weights, values)


def memory_read_gathered(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by gathering one selected parent after the other; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D).
    """
    best, selected = top_k_lowest_index(torch.mm(x, parent_keys.T).to(softmax_dtype(x.dtype)), top_k)
    return read_gathered(x, torch.softmax(best, dim=-1), selected, child_keys, child_values, temperature)[0]


def read_gathered(
    x: Tensor, gate: Tensor, selected: Tensor, child_keys: Tensor, child_values: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Read the children of selected parents, given these and their weights, (N, K).

    Returns:
        The states after the read, (N, D), and each parent's softmax over its children, (N, K, C).
    """
    output, attention = x.to(gate.dtype), []
    for rank in range(selected.shape[1]):  # one at a time: the largest temporary is (N, C, D)
        scores = torch.matmul(child_keys[selected[:, rank]], x.unsqueeze(-1)).squeeze(-1).to(gate.dtype)  # (N, C)
        attention.append(torch.softmax(scores / temperature, dim=-1))
        weights = gate[:, rank : rank + 1] * attention[-1]
        read = torch.matmul(weights.to(x.dtype).unsqueeze(1), child_values[selected[:, rank]])  # (N, 1, D)
        output = output + read.squeeze(1)
    return output.to(x.dtype), torch.stack(attention, dim=1)


def _read_few(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """The same for a few tokens, where copies and the number of operations cost more than arithmetic."""
    num_parents, num_children, hidden = child_keys.shape
    child_scores = torch.mm(x, child_keys.reshape(-1, hidden).t()).view(-1, num_parents, num_children)
    if temperature != 1.0:
        child_scores = child_scores / temperature
    gate = _gate(torch.mm(x, parent_keys.t()), top_k)
    weights = torch.softmax(child_scores, -1) * gate.unsqueeze(-1)  # (N, P, C)
    return torch.addmm(x, weights.view(-1, num_parents * num_children), child_values.reshape(-1, hidden))


def _gate(parent_scores: Tensor, top_k: int) -> Tensor:
    """Softmax over the selected parents, zero for the others, (N, P)."""
    if top_k == parent_scores.shape[-1]:
        return torch.softmax(parent_scores, dim=-1)
    # Renormalising a softmax over the selected parents is the softmax of the selected scores.
    best, selected = top_k_lowest_index(parent_scores, top_k)
    return torch.zeros_like(parent_scores).scatter(-1, selected, torch.softmax(best, dim=-1))
