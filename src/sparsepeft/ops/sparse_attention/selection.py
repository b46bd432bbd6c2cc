"""Which keys are kept, by their similarity.

Token granularity: every query keeps keys of its own. Block granularity: a block of queries keeps blocks of keys, chosen
by their mean keys, or, by matches, by histograms of their codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.similarity import Codes

_ABOVE_ANY_DISTANCE = 1 << 34  # positions are int32
_ABOVE_ANY_SCORE = 1 << 24
# So many queries at a time that a tile of scores has about this many entries (int64 while selecting: 32 MiB).
_TILE_ENTRIES = 1 << 22


def keep_tokens(scores: Tensor, visibility: Visibility, settings: Settings) -> Tensor:
    """Return which keys each query keeps, bool, (B, H, Tq, Tk), by the scores of all pairs: whole numbers.

    Kept are the query's own position and the first valid key, where asked for and valid, then the keys with the
    largest scores; of equal ones the nearest, of equally near the earlier; ``top_l`` in all, or all that are valid.
    """
    num_keys = scores.shape[-1]
    valid = visibility.pairs(num_keys)  # (B, 1, Tq, Tk)
    index = torch.arange(num_keys, device=scores.device)
    positions = visibility.positions.long()[:, None, :, None]

    priority = scores.long()  # one integer says it all: priority first, then nearness
    if settings.keep_first:
        first = valid & (valid.cumsum(-1) == 1)
        priority = priority.masked_fill(first, _ABOVE_ANY_SCORE)
    if settings.keep_self:
        priority = priority.masked_fill(index == positions, _ABOVE_ANY_SCORE + 1)
    distance = 2 * (index - positions).abs() + (index > positions)
    rank = (priority * _ABOVE_ANY_DISTANCE - distance).masked_fill(~valid, torch.iinfo(torch.int64).min)

    best = rank.topk(min(settings.top_l, num_keys), dim=-1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True) & valid


class BlockLists(NamedTuple):
    """The key blocks kept by each of the I query blocks: the first ``counts`` of ``indices``, ascending, int32.

    ``indices`` is (B, H, I, K), K as in :func:`list_shape`; ``counts`` is (B, H, I).
    """

    indices: Tensor
    counts: Tensor

    def pairs(self, num_queries: int, num_keys: int, block_size: int) -> Tensor:
        """Return which queries and keys lie in kept blocks, bool, (B, H, Tq, Tk)."""
        kept = self.to_mask(-(-num_keys // block_size))
        kept = kept.repeat_interleave(block_size, -1)[..., :num_keys]
        return kept.repeat_interleave(block_size, -2)[..., :num_queries, :]

    def to_mask(self, num_key_blocks: int) -> Tensor:
        """Return the lists as bool, (B, H, I, J)."""
        used = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts.unsqueeze(-1)
        mask = torch.zeros(*self.counts.shape, num_key_blocks + 1, dtype=torch.bool, device=self.indices.device)
        # Unused entries go to a column that is cut off.
        return mask.scatter(-1, self.indices.long().masked_fill(~used, num_key_blocks), True)[..., :-1]


# What each query selects its keys by again, or what was selected: lists of blocks.
Selection = Codes | BlockLists


class BlockLayout(NamedTuple):
    """How query blocks I and key blocks J lie to each other, whatever they are like: (B, I, J) each.

    ``possible``: the key block holds a valid key for a query of the block; ``own``: and a query's own position;
    ``first``: it is the first possible one; ``distance``: blocks between them, twice, and one more if J comes after I.
    """

    possible: Tensor
    own: Tensor
    first: Tensor
    distance: Tensor

    @classmethod
    def of(cls, visibility: Visibility, num_keys: int, size: int) -> BlockLayout:
        """Work it out for blocks of ``size`` tokens."""
        index = torch.arange(-(-num_keys // size), device=visibility.positions.device)
        nearest, farthest = (torch.div(p, size, rounding_mode="floor") for p in _extent(visibility.positions, size))
        lower, upper = _extent(visibility.lower, size)[0], _extent(visibility.upper, size)[1]  # (B, I, 1)
        possible = _blocks_seen(lower, upper, visibility.key_mask, num_keys, size)
        distance = 2 * torch.maximum(nearest - index, index - farthest).clamp_min(0) + (index > farthest)
        own = possible & (index >= nearest) & (index <= farthest)
        return cls(possible, own, possible & (possible.cumsum(-1) == 1), distance)


def pooled_scores(query: Tensor, key: Tensor, visibility: Visibility, settings: Settings) -> Tensor:
    """Return how much query blocks I attend to key blocks J, were all keys of a block their mean: (B, H, I, J).

    It is the sum, over the real queries of I, of softmax_J(scale * q . mean key of J). A query's softmax is over the
    blocks with a valid key for it, apart from those kept anyway: the own positions' (``keep_self``) and the first
    (``keep_first``). Padding does not count, see :func:`match_scores`.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D); masked keys do not count.
    """
    size, num_keys, precise = settings.block_size, key.shape[2], softmax_dtype(query.dtype)
    batch, heads, num_queries, _ = query.shape
    layout = BlockLayout.of(visibility, num_keys, size)
    real = torch.ones(batch, num_keys, device=key.device) if visibility.key_mask is None else visibility.key_mask
    real = F.pad(real.to(precise), (0, -num_keys % size)).unflatten(-1, (-1, size))[:, None, :, None]  # (B, 1, J, 1, S)
    keys = F.pad(key.to(precise), (0, 0, 0, -num_keys % size)).unflatten(2, (-1, size))
    pooled = (real @ keys).squeeze(-2) / real.sum(-1).clamp_min(1)  # (B, Hkv, J, D)

    anyway = torch.zeros_like(layout.possible)
    if settings.keep_self:
        anyway = anyway | layout.own
    if settings.keep_first:
        anyway = anyway | layout.first
    queries_real = _real_queries(visibility, num_keys, settings)
    scores = torch.empty(batch, heads, *layout.possible.shape[1:], dtype=precise, device=query.device)
    step = max(1, _TILE_ENTRIES // (batch * heads * scores.shape[-1] * size)) * size
    for begin in range(0, num_queries, step):
        rows = slice(begin, min(begin + step, num_queries))
        blocks = slice(begin // size, -(-rows.stop // size))
        part = visibility.queries(rows.start, rows.stop)
        limits = part.lower.unsqueeze(-1), part.upper.unsqueeze(-1)
        seen = _blocks_seen(*limits, visibility.key_mask, num_keys, size)
        seen = seen & ~anyway[:, blocks].repeat_interleave(size, 1)[:, : rows.stop - rows.start]
        products = query[:, :, rows].to(precise).unflatten(1, (key.shape[1], -1)) @ pooled.unsqueeze(2).mT
        products = (products.flatten(1, 2) * settings.scale).masked_fill(~seen.unsqueeze(1), -torch.inf)
        weights = torch.softmax(products, dim=-1).masked_fill(~seen.unsqueeze(1), 0)
        if queries_real is not None:
            weights = weights * queries_real[:, None, rows, None]
        weights = F.pad(weights, (0, 0, 0, -weights.shape[2] % size)).unflatten(2, (-1, size))
        scores[:, :, blocks] = weights.sum(3)
    return scores


def match_scores(query_codes: Tensor, key_codes: Tensor, visibility: Visibility, settings: Settings) -> Tensor:
    """Return the similarity of query blocks I and key blocks J, float32, (B, H, I, J).

    It is the mean number of equal codes over the pairs of real queries in I and unmasked keys in J:
    sum_m sum_c h_I(m, c) h_J(m, c) / (n_I n_J), with h the histogram of codes and n the number of tokens of a block.
    Causality and window do not enter: they decide which blocks can be chosen. With ``keep_self`` a query whose own key
    is masked is padding and not counted. The sums are whole numbers below 2^24, hence exact, up to blocks of 512
    tokens with 64 sub-vectors.
    """
    heads, kv_heads, num_keys = query_codes.shape[1], key_codes.shape[1], key_codes.shape[2]
    queries_real = _real_queries(visibility, num_keys, settings)
    query_counts = _histograms(query_codes, queries_real, settings.block_size)  # (B, H, I, 1 + M * 16)
    key_counts = _histograms(key_codes, visibility.key_mask, settings.block_size)  # (B, Hkv, J, 1 + M * 16)
    grouped = query_counts.unflatten(1, (kv_heads, heads // kv_heads))
    others = key_counts.unsqueeze(2).mT
    equal = (grouped[..., 1:] @ others[..., 1:, :]).flatten(1, 2)
    pairs = (grouped[..., :1] @ others[..., :1, :]).flatten(1, 2)
    return equal / pairs.clamp_min(1)


def keep_blocks(scores: Tensor, num_keys: int, visibility: Visibility, settings: Settings) -> BlockLists:
    """Return the key blocks each query block keeps: ceil(top_l / block_size), or all that can be chosen.

    A block can be chosen if it holds a valid key for a query of the block. First come the blocks that hold the queries'
    own positions (if ``keep_self``; two of them even where one is to be kept), then the first block that can be chosen
    (if ``keep_first``), then by score, (B, H, I, J), of equal scores the nearest, of equally near the earlier.
    """
    size = settings.block_size
    possible, own, first, distance = BlockLayout.of(visibility, num_keys, size)
    if settings.keep_first:
        scores = scores.masked_fill(first.unsqueeze(1), torch.inf)
    num_kept = torch.full_like(possible[..., :1], -(-settings.top_l // size), dtype=torch.long)
    ahead = torch.zeros_like(possible)
    if settings.keep_self:
        num_kept, ahead = num_kept.maximum(own.sum(-1, keepdim=True).clamp_max(2)), own
    scores = scores.masked_fill(~possible.unsqueeze(1), -torch.inf)

    # Least significant first, each sort stable: nearness, score, own blocks.
    by_distance = distance.sort(dim=-1, stable=True).indices.unsqueeze(1).expand_as(scores)
    by_score = scores.gather(-1, by_distance).sort(dim=-1, descending=True, stable=True).indices
    order = by_distance.gather(-1, by_score)
    ahead_in_order = ahead.unsqueeze(1).expand_as(scores).gather(-1, order).to(torch.uint8)
    order = order.gather(-1, ahead_in_order.sort(dim=-1, descending=True, stable=True).indices)
    index = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
    kept = (rank < num_kept.unsqueeze(1)) & possible.unsqueeze(1)
    num_listed = max(2, -(-settings.top_l // size))
    ascending = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :num_listed]
    return BlockLists(ascending.to(torch.int32).contiguous(), kept.sum(-1, dtype=torch.int32))


def list_shape(query_shape: torch.Size, num_keys: int, top_l: int, block_size: int) -> tuple[int, int, int, int]:
    """Return the shape (B, H, I, K) of the lists: known beforehand, so that nothing waits for a device."""
    batch, heads, num_queries, _ = query_shape
    num_kept = max(2, -(-top_l // block_size))  # consecutive positions lie in two blocks at most
    return batch, heads, -(-num_queries // block_size), min(num_kept, -(-num_keys // block_size))


def kept_tiles(
    query: Tensor, selection: Selection, num_keys: int, visibility: Visibility, settings: Settings
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the queries, (B, H, Tq, D), with the pairs they keep, bool, (B, H, rows, Tk)."""
    batch, heads, num_queries, _ = query.shape
    step = max(1, _TILE_ENTRIES // (batch * heads * num_keys))
    if settings.block_size:
        step = -(-step // settings.block_size) * settings.block_size
    for begin in range(0, num_queries, step):
        rows = slice(begin, min(begin + step, num_queries))
        part = visibility.queries(rows.start, rows.stop)
        if isinstance(selection, BlockLists):
            blocks = slice(begin // settings.block_size, -(-rows.stop // settings.block_size))
            lists = BlockLists(selection.indices[:, :, blocks], selection.counts[:, :, blocks])
            kept = lists.pairs(rows.stop - rows.start, num_keys, settings.block_size) & part.pairs(num_keys)
        else:
            kept = keep_tokens(selection.scores(query, rows), part, settings)
        yield rows, kept


def _blocks_seen(lower: Tensor, upper: Tensor, key_mask: Tensor | None, num_keys: int, size: int) -> Tensor:
    """Return which blocks hold an unmasked key from ``lower`` to before ``upper``, (B, N, 1) each: bool, (B, N, J)."""
    index = torch.arange(-(-num_keys // size), device=lower.device)
    starts = torch.maximum(index * size, lower).long()
    ends = torch.minimum(((index + 1) * size).clamp_max(num_keys), upper).long()
    if key_mask is None:
        return starts < ends
    before = F.pad(key_mask.long().cumsum(-1), (1, 0))
    counts = [before.gather(1, t.clamp_max(num_keys).flatten(1)).view_as(t) for t in (starts, ends)]
    return (starts < ends) & (counts[1] > counts[0])


def _real_queries(visibility: Visibility, num_keys: int, settings: Settings) -> Tensor | None:
    """Return which queries are no padding, bool, (B, Tq), None for all: with ``keep_self`` the own key says it."""
    if visibility.key_mask is None or not settings.keep_self:
        return None
    inside = (visibility.positions >= 0) & (visibility.positions < num_keys)
    return visibility.key_mask.gather(1, visibility.positions.clamp(0, num_keys - 1).long()) | ~inside


def _histograms(codes: Tensor, real: Tensor | None, block_size: int) -> Tensor:
    """Count the tokens of each block, then the codes of each sub-vector in it: float32, (B, H, blocks, 1 + M * 16)."""
    batch, heads, num_tokens, num_subvectors = codes.shape
    num_blocks = -(-num_tokens // block_size)
    counts = torch.zeros(batch, heads, num_blocks, 1 + num_subvectors * 16, device=codes.device)
    if num_tokens == 0:
        return counts
    weights = torch.ones(batch, 1, num_tokens, 1, device=codes.device)
    if real is not None:
        weights = real.to(weights.dtype)[:, None, :, None]
    columns = 1 + codes.long() + 16 * torch.arange(num_subvectors, device=codes.device)
    columns = torch.cat([torch.zeros_like(columns[..., :1]), columns], -1)  # (B, H, T, 1 + M)
    padding = (0, 0, 0, num_blocks * block_size - num_tokens)
    columns = F.pad(columns, padding).view(batch, heads, num_blocks, -1)
    weights = F.pad(weights.expand(batch, heads, num_tokens, 1 + num_subvectors), padding)
    return counts.scatter_add_(-1, columns, weights.reshape(batch, heads, num_blocks, -1))


def _extent(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest of each block's values, (B, I, 1) each."""
    missing = -values.shape[1] % block_size
    blocks = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, block_size))
    return blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
