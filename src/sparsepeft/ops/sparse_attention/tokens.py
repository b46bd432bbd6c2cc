"""Token granularity: every query keeps its own keys. Quadratic in the number of tokens given; callers pass chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.sparse_attention.problem import Reach, Rules

_ABOVE_ANY_DISTANCE = 1 << 34  # positions are int32


def count_matches(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Return the number of equal codes of every query and key, 0 to M.

    Args:
        query_codes: (B, H, Tq, M), from :func:`encode`.
        key_codes: (B, Hkv, Tk, M); H is a multiple of Hkv.

    Returns:
        int32, (B, H, Tq, Tk).
    """
    batch, heads, num_queries, num_subvectors = query_codes.shape
    _, kv_heads, num_keys, _ = key_codes.shape
    grouped = query_codes.unflatten(1, (kv_heads, heads // kv_heads))
    matches = torch.zeros(
        batch, kv_heads, heads // kv_heads, num_queries, num_keys, dtype=torch.int32, device=query_codes.device
    )
    for m in range(num_subvectors):
        matches += grouped[..., m].unsqueeze(-1) == key_codes[..., m][:, :, None, None]
    return matches.flatten(1, 2)


def keep_tokens(query_codes: Tensor, key_codes: Tensor, reach: Reach, rules: Rules) -> Tensor:
    """Return which keys each query keeps, bool, (B, H, Tq, Tk).

    Kept are the query's own position and the first valid key, where asked for and valid, then the keys with the most
    equal codes; of equally many the nearest, of equally near the earlier; ``top_l`` in all, or all that are valid.
    """
    matches = count_matches(query_codes, key_codes).long()
    num_subvectors, num_keys = query_codes.shape[-1], key_codes.shape[2]
    valid = reach.pairs(num_keys)  # (B, 1, Tq, Tk)
    index = torch.arange(num_keys, device=matches.device)
    positions = reach.positions.long()[:, None, :, None]

    priority = matches  # one integer says it all: priority first, then nearness
    if rules.keep_first:
        first = valid & (valid.cumsum(-1) == 1)
        priority = priority.masked_fill(first, num_subvectors + 1)
    if rules.keep_self:
        priority = priority.masked_fill(index == positions, num_subvectors + 2)
    distance = 2 * (index - positions).abs() + (index > positions)
    rank = (priority * _ABOVE_ANY_DISTANCE - distance).masked_fill(~valid, torch.iinfo(torch.int64).min)

    best = rank.topk(min(rules.top_l, num_keys), dim=-1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True) & valid
