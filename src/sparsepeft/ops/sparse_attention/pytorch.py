"""Plain PyTorch in linear memory: dense scores of a few queries at a time, computed again in backward.

It saves memory, not arithmetic: scores of keys that are not kept are computed and thrown away. It runs on every device
and in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility
from sparsepeft.ops.sparse_attention.selection import Selection, kept_tiles


def torch_forward(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the output, (B, H, Tq, Dv), and the log-sum-exp of the scores, (B, H, Tq)."""
    precise = softmax_dtype(query.dtype)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = torch.empty(query.shape[:3], dtype=precise, device=query.device)
    values = value.to(precise).unsqueeze(2)
    for rows, scores in _score_tiles(query, key, selection, visibility, settings):  # (B, Hkv, G, rows, Tk)
        # A row without a kept key: every weight is exp(-inf - 0), hence zero, here and in backward.
        total = scores.logsumexp(-1, keepdim=True)
        total = total.masked_fill(total == -torch.inf, 0)
        output[:, :, rows] = (torch.exp(scores - total) @ values).flatten(1, 2).to(output.dtype)
        log_sum_exp[:, :, rows] = total.flatten(1, 2).squeeze(-1)
    return output, log_sum_exp


def torch_backward(
    grad_output: Tensor, attended: Attended, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    With P the weights and S the scores: dV = P^T dO, dS = P * (dO V^T - sum(dO * O)), dQ = dS K, dK = dS^T Q.
    """
    query, key, value, output, log_sum_exp = attended
    precise, kv_heads = softmax_dtype(query.dtype), key.shape[1]
    keys, values = key.to(precise).unsqueeze(2), value.to(precise).unsqueeze(2)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros_like(t, dtype=precise) for t in (keys, values))
    for rows, scores in _score_tiles(query, key, selection, visibility, settings):
        queries, grads, outputs, total = (
            tensor[:, :, rows].to(precise).unflatten(1, (kv_heads, -1))
            for tensor in (query, grad_output, output, log_sum_exp.unsqueeze(-1))
        )
        weights = torch.exp(scores - total)
        delta = (grads * outputs).sum(-1, keepdim=True)
        slopes = weights * (grads @ values.mT - delta) * settings.scale
        if settings.softcap > 0:
            slopes = slopes * (1 - (scores / settings.softcap).square()).masked_fill(weights == 0, 0)
        grad_query[:, :, rows] = (slopes @ keys).flatten(1, 2).to(query.dtype)
        grad_key += (slopes.mT @ queries).sum(2, keepdim=True)
        grad_value += (weights.mT @ grads).sum(2, keepdim=True)
    return grad_query, grad_key.squeeze(2).to(key.dtype), grad_value.squeeze(2).to(value.dtype)


def _score_tiles(
    query: Tensor, key: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of queries with their scores, (B, Hkv, G, rows, Tk), -inf where a key is not kept."""
    kv_heads, num_keys, precise = key.shape[1], key.shape[2], softmax_dtype(query.dtype)
    keys = key.to(precise).unsqueeze(2).mT
    for rows, kept in kept_tiles(query, selection, num_keys, visibility, settings):
        scores = query[:, :, rows].to(precise).unflatten(1, (kv_heads, -1)) @ keys * settings.scale
        if settings.softcap > 0:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        yield rows, scores.masked_fill(~kept.unflatten(1, (kv_heads, -1)), -torch.inf)
