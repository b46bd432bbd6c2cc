"""Keeping all parents of a sparse memory in use."""

from __future__ import annotations

import torch


def load_balancing_loss(
    x: torch.Tensor, parent_keys: torch.Tensor, *, top_k: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""How unevenly positions choose parents: 1 when all are chosen alike, up to P / K when always the same K.

    loss = P * sum_p f_p * m_p, with f_p the share of all selections that went to parent p and m_p the mean of
    softmax(x k_p) over positions; the gradient flows through m_p.

    Source: the Switch Transformer's auxiliary loss (arXiv:2101.03961, Eq. 4-6), for K choices instead of one.

    Args:
        x: hidden states, (B, T, D).
        parent_keys: (P, D).
        top_k: K, parents kept per position.
        mask: (B, T), non-zero where a position counts; None counts all.

    Returns:
        A scalar in float32; 0 if no position counts.
    """
    positions = x[mask.bool()] if mask is not None else x.reshape(-1, x.shape[-1])
    if positions.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float32)
    probabilities = (positions.float() @ parent_keys.float().t()).softmax(-1)  # (N, P)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
    shares = chosen.mean(0) / top_k
    return parent_keys.shape[0] * (shares.detach() * probabilities.mean(0)).sum()
