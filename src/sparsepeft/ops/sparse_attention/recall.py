"""How well the codes find the keys that exact scores would pick."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.memory.select import softmax_dtype
from sparsepeft.ops.sparse_attention.blocks import keep_blocks
from sparsepeft.ops.sparse_attention.checks import check_arguments
from sparsepeft.ops.sparse_attention.chunked import kept_tiles
from sparsepeft.ops.sparse_attention.codes import encode
from sparsepeft.ops.sparse_attention.problem import Reach, Rules


@torch.no_grad()
def selection_recall(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor,
    *,
    top_l: int,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    keep_self: bool = True,
    keep_first: bool = True,
    granularity: str = "token",
    block_size: int = 64,
) -> float:
    """Return the share of the true top-L keys, by exact score q . k, that the selection keeps.

    Queries with no more than ``top_l`` valid keys keep them all and say nothing: they are left out, and if all queries
    are such, the recall is 1. Arguments and errors as for :func:`sparse_attention`.
    """
    check_arguments(
        *(query, key, key, codebooks, top_l, causal, key_mask, query_positions, window, None, None),
        granularity=granularity,
        block_size=block_size,
    )
    num_keys, precise = key.shape[2], softmax_dtype(query.dtype)
    rules = Rules(top_l, 1.0, 0.0, keep_self, keep_first, block_size if granularity == "block" else 0)
    reach = Reach.of(
        query.shape[0],
        query.shape[2],
        num_keys,
        causal=causal,
        window=window,
        query_positions=query_positions,
        key_mask=key_mask,
        device=query.device,
    )
    query_codes, key_codes = encode(query, codebooks), encode(key, codebooks)
    codes = keep_blocks(query_codes, key_codes, reach, rules) if rules.block_size else (query_codes, key_codes)
    found = total = 0
    keys = key.to(precise).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    for rows, kept in kept_tiles(query.shape, codes, num_keys, reach, rules):
        valid = reach.queries(rows.start, rows.stop).pairs(num_keys)
        scores = (query[:, :, rows].to(precise) @ keys.mT).masked_fill(~valid, -torch.inf)
        best = scores.topk(min(top_l, num_keys), dim=-1).indices
        counted = (valid.sum(-1) > top_l).expand(kept.shape[:-1])
        found += int(kept.gather(-1, best)[counted].sum())
        total += int(counted.sum()) * top_l
    return found / total if total else 1.0
