"""Keeping all parents of a sparse memory, or all blocks of a routed FFN, in use."""

from __future__ import annotations

import torch

from sparsepeft.ops.product_memory.search import half_scores, select_pairs


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
    logits = _positions(x, mask) @ parent_keys.float().t()  # (N, P)
    return routing_load_balancing_loss(logits, logits.topk(top_k, -1).indices)


def product_load_balancing_loss(
    x: torch.Tensor,
    first_keys: torch.Tensor,
    second_keys: torch.Tensor,
    *,
    top_k: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""How unevenly positions choose the halves of product keys: 1 when all halves are chosen alike, up to n.

    The mean over both tables of n * sum_i f_i * m_i, with f_i the share of all selections that went to a parent with
    the half i, and m_i the mean of softmax(x a_i) over positions, through which the gradient flows.

    Source: as :func:`load_balancing_loss`. A position's softmax over all P = n * n parents is the product of those over
    the halves, so these are its exact marginals. Differs: pairs may still be uneven where halves are not.

    Args:
        x: hidden states, (B, T, D).
        first_keys, second_keys: (n, D1), (n, D2), D1 + D2 = D.
        top_k: K, parents kept per position.
        mask: (B, T), non-zero where a position counts; None counts all.

    Returns:
        A scalar in float32; 0 if no position counts.
    """
    positions, n = _positions(x, mask), len(first_keys)
    if not len(positions):
        return positions.new_zeros(())
    first, second = half_scores(positions, first_keys.float(), second_keys.float())  # (N, n) each
    parents = select_pairs(first.detach(), second.detach(), top_k).flatten()
    losses = []
    for half, chosen in ((first, parents // n), (second, parents % n)):
        shares = chosen.bincount(minlength=n) / len(chosen)
        losses.append(n * (shares * half.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def _positions(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The hidden states that count, (N, D), in float32."""
    return (x[mask.bool()] if mask is not None else x.reshape(-1, x.shape[-1])).float()


def routing_load_balancing_loss(
    logits: torch.Tensor, blocks: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""How unevenly tokens are routed: 1 when all blocks are chosen alike, up to G / G' when always the same G'.

    loss = G * sum_g f_g * m_g, with f_g the share of all choices that went to block g and m_g the mean of
    softmax(logits)_g over tokens; the gradient flows through m_g.

    Source: as :func:`load_balancing_loss`.

    Args:
        logits: the router's, (N, G).
        blocks: the chosen blocks, (N, G').
        mask: any shape of N entries, non-zero where a token counts; None counts all.

    Returns:
        A scalar in float32; 0 if no token counts.

    Raises:
        ValueError: ``mask`` is not for N tokens.
    """
    if mask is not None:
        if mask.numel() != logits.shape[0]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, but {logits.shape[0]} tokens were routed.")
        counted = mask.reshape(-1).bool()
        logits, blocks = logits[counted], blocks[counted]
    if logits.shape[0] == 0:
        return logits.new_zeros((), dtype=torch.float32)
    probabilities = logits.float().softmax(-1)  # (N, G)
    chosen = torch.zeros_like(probabilities).scatter_(1, blocks, 1.0)
    shares = chosen.mean(0) / blocks.shape[1]
    return logits.shape[1] * (shares.detach() * probabilities.mean(0)).sum()
