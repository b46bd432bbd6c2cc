"""Sparse attention as one would write it down. The other implementations are tested against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.quantization import select
from sparsepeft.ops.sparse_attention.selection import BlockLists, Selection, keep_tokens


def sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    channel_weights: Tensor | None,
    visibility: Visibility,
    settings: Settings,
) -> Tensor:
    """Attend to the kept keys alone; see :func:`sparse_attention`. It holds several (B, H, Tq, Tk) tensors."""
    selection = select(query, key, codebooks, channel_weights, visibility, settings)
    kept = kept_pairs(query, key.shape[2], selection, visibility, settings)  # (B, H, Tq, Tk)
    group, precise = query.shape[1] // key.shape[1], softmax_dtype(query.dtype)
    keys, values = (tensor.repeat_interleave(group, dim=1).to(precise) for tensor in (key, value))

    scores = query.to(precise) @ keys.mT * settings.scale
    if settings.softcap > 0:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores.masked_fill(~kept, -torch.inf)
    # A row without a kept key would be NaN in the softmax and in its gradient: it gets a score, and weight zero.
    scores = scores.masked_fill(~kept.any(-1, keepdim=True), 0)
    weights = torch.softmax(scores, dim=-1).masked_fill(~kept, 0)
    return (weights @ values).to(query.dtype)


@torch.no_grad()
def kept_pairs(
    query: Tensor, num_keys: int, selection: Selection, visibility: Visibility, settings: Settings
) -> Tensor:
    """Return which pairs of query and key take part in the attention, bool, (B, H, Tq, Tk)."""
    num_queries = query.shape[2]
    if isinstance(selection, BlockLists):
        return selection.pairs(num_queries, num_keys, settings.block_size) & visibility.pairs(num_keys)
    return keep_tokens(selection.scores(query, slice(num_queries)), visibility, settings)
