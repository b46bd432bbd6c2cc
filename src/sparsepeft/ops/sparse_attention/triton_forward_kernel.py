"""Triton kernel of sparse attention, forward, and what it shares with backward: flash attention over kept pairs.

Which pairs of a tile take part is worked out again from tables, codes and thresholds, see
``triton_selection_kernels.py``: nothing is stored per pair. A tile without such a pair is computed all the same: among
thousands of pairs some are kept as a rule, and a branch would keep the loads of the next tile from running ahead. Tiles
beyond every query's limits are left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsepeft.ops.sparse_attention.triton_selection_kernels import distance_of, load_limits, similarity

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def kept_pairs(
    tables: tl.tensor,
    key_words: tl.tensor,
    key_mask: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    position: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    first: tl.tensor,
    cut: tl.tensor,
    reach: tl.tensor,
    WORDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEEP_SELF: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
) -> tl.tensor:
    """Return which pairs take part, (queries, keys), or (keys, queries) if KEYS_FIRST."""
    scores = similarity(tables, key_words, num_queries, num_keys, queries, keys, WORDS, KEYS_FIRST)
    own: tl.constexpr = 0 if KEYS_FIRST else 1  # the axis that queries' numbers lack
    key, position = tl.expand_dims(keys, 1 - own), tl.expand_dims(position, own)
    is_near = distance_of(key - position) <= tl.expand_dims(reach, own)
    kept = (scores + is_near.to(tl.int32) > tl.expand_dims(cut, own)) | (key == tl.expand_dims(first, own))
    if KEEP_SELF:
        kept |= key == position
    kept &= (key >= tl.expand_dims(lower, own)) & (key < tl.expand_dims(upper, own))
    if HAS_MASK:
        is_shown = tl.load(key_mask + keys, mask=keys < num_keys, other=0) != 0
        kept &= tl.expand_dims(is_shown, 1 - own)
    return kept


@triton.jit
def load_thresholds(thresholds: tl.tensor, num_queries: tl.tensor, queries: tl.tensor, in_tile: tl.tensor) -> tl.tensor:
    """Return the score and the reach of queries, from which pairs are kept."""
    cut = tl.load(thresholds + queries, mask=in_tile, other=0)
    return cut, tl.load(thresholds + num_queries + queries, mask=in_tile, other=0)


@triton.jit
def scores_of(products: tl.tensor, scale: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Return scores of products of queries and keys, and their slope in these but for ``scale``."""
    scores = products * scale
    slope = 1.0
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0)  # tanh
        scores = softcap * bent
        slope = 1.0 - bent * bent
    return scores, slope


@triton.jit
def load_rows(
    base: tl.tensor, rows: tl.tensor, num_rows: tl.tensor, stride: tl.tensor, D: tl.constexpr, PADDED_D: tl.constexpr
) -> tl.tensor:
    """Return vectors, (rows, PADDED_D), with zeros where there are none."""
    channels = tl.arange(0, PADDED_D)
    mask = (rows < num_rows)[:, None] & (channels < D)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    base: tl.tensor, values: tl.tensor, rows: tl.tensor, num_rows: tl.tensor, D: tl.constexpr, PADDED_D: tl.constexpr
) -> None:
    """Store vectors, (rows, PADDED_D), to a contiguous tensor."""
    channels = tl.arange(0, PADDED_D)
    mask = (rows < num_rows)[:, None] & (channels < D)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * D + channels[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attention_fwd_kernel(
    query_ptr: tl.tensor,  # (B, H, Tq, D), strides below, D contiguous
    key_ptr: tl.tensor,  # (B, Hkv, Tk, D), the same
    value_ptr: tl.tensor,  # (B, Hkv, Tk, DV), the same
    output_ptr: tl.tensor,  # (B, H, Tq, DV), contiguous as all below
    log_sum_exp_ptr: tl.tensor,  # (B, H, Tq), float32
    tables_ptr: tl.tensor,  # (B, H, Tq, WORDS * 128)
    key_words_ptr: tl.tensor,  # (B, Hkv, WORDS, Tk)
    thresholds_ptr: tl.tensor,  # (B, H, 2, Tq)
    limits_ptr: tl.tensor,  # (B, 6, Tq)
    key_mask_ptr: tl.tensor,  # (B, Tk), uint8, if HAS_MASK
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,
    num_tiles: tl.tensor,
    stride_qb: tl.tensor,
    stride_qh: tl.tensor,
    stride_qt: tl.tensor,
    stride_kb: tl.tensor,
    stride_kh: tl.tensor,
    stride_kt: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vt: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEEP_SELF: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    kv_head = head // group
    kv_row = batch * (num_heads // group) + kv_head
    queries = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # longest rows first
    in_tile = queries < num_queries
    tables_ptr += row * num_queries * (WORDS * 128)
    key_words_ptr += kv_row * WORDS * num_keys
    if HAS_MASK:
        key_mask_ptr += batch * num_keys
    key_ptr += batch * stride_kb + kv_head * stride_kh
    value_ptr += batch * stride_vb + kv_head * stride_vh
    position, lower, upper, first = load_limits(
        limits_ptr + batch * 6 * num_queries, num_queries, num_keys, queries, in_tile
    )
    cut, reach = load_thresholds(thresholds_ptr + row * 2 * num_queries, num_queries, queries, in_tile)
    query = load_rows(query_ptr + batch * stride_qb + head * stride_qh, queries, num_queries, stride_qt, D, PADDED_D)

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    read = tl.zeros((BLOCK_Q, PADDED_DV), tl.float32)
    begin = tl.min(lower) // BLOCK_K * BLOCK_K
    for start in range(begin, tl.max(upper), BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        kept = kept_pairs(
            *(tables_ptr, key_words_ptr, key_mask_ptr, num_queries, num_keys, queries, keys),
            *(position, lower, upper, first, cut, reach, WORDS, HAS_MASK, KEEP_SELF, False),
        )
        key = load_rows(key_ptr, keys, num_keys, stride_kt, D, PADDED_D)
        scores, _ = scores_of(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, softcap, SOFTCAP)
        scores = tl.where(kept, scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # nothing kept yet
        weights = tl.exp2((scores - base[:, None]) * LOG2_E)
        shrink = tl.exp2((before - base) * LOG2_E)
        total = total * shrink + tl.sum(weights, axis=1)
        value = load_rows(value_ptr, keys, num_keys, stride_vt, DV, PADDED_DV)
        read = tl.dot(weights.to(value.dtype), value, read * shrink[:, None], input_precision="ieee")

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    read /= total[:, None]
    store_rows(output_ptr + row * num_queries * DV, read, queries, num_queries, DV, PADDED_DV)
    log_sum_exp = tl.where(empty, 0.0, largest + tl.log(total))
    tl.store(log_sum_exp_ptr + row * num_queries + queries, log_sum_exp, mask=in_tile)
