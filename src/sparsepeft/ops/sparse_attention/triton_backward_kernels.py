"""Triton kernels of sparse attention, backward; weights are computed again from the log-sum-exp.

With P the weights and S the scores: dV = P^T dO, dS = P * (dO V^T - sum(dO * O)), dQ = dS K, dK = dS^T Q. One kernel
sums over keys, the other over queries and the heads of a group: each in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsepeft.ops.sparse_attention.triton_forward_kernel import (
    LOG2_E,
    kept_pairs,
    load_rows,
    load_thresholds,
    scores_of,
    store_rows,
)
from sparsepeft.ops.sparse_attention.triton_selection_kernels import load_limits


@triton.jit
def _attention_bwd_query_kernel(
    grad_output_ptr: tl.tensor,  # (B, H, Tq, DV), strides below, DV contiguous
    query_ptr: tl.tensor,  # (B, H, Tq, D), the same
    key_ptr: tl.tensor,  # (B, Hkv, Tk, D), the same
    value_ptr: tl.tensor,  # (B, Hkv, Tk, DV), the same
    output_ptr: tl.tensor,  # (B, H, Tq, DV), contiguous as all below
    log_sum_exp_ptr: tl.tensor,  # (B, H, Tq), float32
    delta_ptr: tl.tensor,  # (B, H, Tq), float32, written here for the other kernel: sum(dO * O)
    grad_query_ptr: tl.tensor,  # (B, H, Tq, D)
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
    stride_gb: tl.tensor,
    stride_gh: tl.tensor,
    stride_gt: tl.tensor,
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
    queries = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # longest rows first
    in_tile = queries < num_queries
    tables_ptr += row * num_queries * (WORDS * 128)
    key_words_ptr += (batch * (num_heads // group) + kv_head) * WORDS * num_keys
    if HAS_MASK:
        key_mask_ptr += batch * num_keys
    key_ptr += batch * stride_kb + kv_head * stride_kh
    value_ptr += batch * stride_vb + kv_head * stride_vh
    position, lower, upper, first = load_limits(
        limits_ptr + batch * 6 * num_queries, num_queries, num_keys, queries, in_tile
    )
    cut, reach = load_thresholds(thresholds_ptr + row * 2 * num_queries, num_queries, queries, in_tile)
    log_sum_exp = tl.load(log_sum_exp_ptr + row * num_queries + queries, mask=in_tile, other=0.0)
    query = load_rows(query_ptr + batch * stride_qb + head * stride_qh, queries, num_queries, stride_qt, D, PADDED_D)
    grad = load_rows(
        grad_output_ptr + batch * stride_gb + head * stride_gh, queries, num_queries, stride_gt, DV, PADDED_DV
    )
    output = load_rows(output_ptr + row * num_queries * DV, queries, num_queries, DV, DV, PADDED_DV)
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), axis=1)
    tl.store(delta_ptr + row * num_queries + queries, delta, mask=in_tile)

    grad_query = tl.zeros((BLOCK_Q, PADDED_D), tl.float32)
    begin = tl.min(lower) // BLOCK_K * BLOCK_K
    for start in range(begin, tl.max(upper), BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        kept = kept_pairs(
            *(tables_ptr, key_words_ptr, key_mask_ptr, num_queries, num_keys, queries, keys),
            *(position, lower, upper, first, cut, reach, WORDS, HAS_MASK, KEEP_SELF, False),
        )
        key = load_rows(key_ptr, keys, num_keys, stride_kt, D, PADDED_D)
        scores, slope = scores_of(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, softcap, SOFTCAP)
        weights = tl.exp2((scores - log_sum_exp[:, None]) * LOG2_E)
        value = load_rows(value_ptr, keys, num_keys, stride_vt, DV, PADDED_DV)
        agreement = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = tl.where(kept, weights * (agreement - delta[:, None]) * slope, 0.0)
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision="ieee")
    store_rows(grad_query_ptr + row * num_queries * D, grad_query * scale, queries, num_queries, D, PADDED_D)


@triton.jit
def _attention_bwd_key_value_kernel(
    grad_output_ptr: tl.tensor,  # (B, H, Tq, DV), strides below, DV contiguous
    query_ptr: tl.tensor,  # (B, H, Tq, D), the same
    key_ptr: tl.tensor,  # (B, Hkv, Tk, D), the same
    value_ptr: tl.tensor,  # (B, Hkv, Tk, DV), the same
    log_sum_exp_ptr: tl.tensor,  # (B, H, Tq), float32; contiguous as all below
    delta_ptr: tl.tensor,  # (B, H, Tq), float32
    grad_key_ptr: tl.tensor,  # (B, Hkv, Tk, D)
    grad_value_ptr: tl.tensor,  # (B, Hkv, Tk, DV)
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
    stride_gb: tl.tensor,
    stride_gh: tl.tensor,
    stride_gt: tl.tensor,
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
    """Tiles are transposed: a row for each key, a column for each query."""
    kv_row = (tl.program_id(0) // num_tiles).to(tl.int64)
    kv_heads = num_heads // group
    batch, kv_head = kv_row // kv_heads, kv_row % kv_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_K
    keys = start + tl.arange(0, BLOCK_K)
    key_words_ptr += kv_row * WORDS * num_keys
    if HAS_MASK:
        key_mask_ptr += batch * num_keys
    limits_ptr += batch * 6 * num_queries
    key = load_rows(key_ptr + batch * stride_kb + kv_head * stride_kh, keys, num_keys, stride_kt, D, PADDED_D)
    value = load_rows(value_ptr + batch * stride_vb + kv_head * stride_vh, keys, num_keys, stride_vt, DV, PADDED_DV)

    grad_key = tl.zeros((BLOCK_K, PADDED_D), tl.float32)
    grad_value = tl.zeros((BLOCK_K, PADDED_DV), tl.float32)
    for step in range(group * ((num_queries + BLOCK_Q - 1) // BLOCK_Q)):
        head = kv_head * group + step % group
        row = batch * num_heads + head
        queries = step // group * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_tile = queries < num_queries
        position, lower, upper, first = load_limits(limits_ptr, num_queries, num_keys, queries, in_tile)
        if (tl.max(upper) > start) & (tl.min(lower) < start + BLOCK_K):
            cut, reach = load_thresholds(thresholds_ptr + row * 2 * num_queries, num_queries, queries, in_tile)
            kept = kept_pairs(
                *(tables_ptr + row * num_queries * (WORDS * 128), key_words_ptr, key_mask_ptr, num_queries, num_keys),
                *(queries, keys, position, lower, upper, first, cut, reach, WORDS, HAS_MASK, KEEP_SELF, True),
            )
            place = row * num_queries + queries
            log_sum_exp = tl.load(log_sum_exp_ptr + place, mask=in_tile, other=0.0)
            delta = tl.load(delta_ptr + place, mask=in_tile, other=0.0)
            query = load_rows(
                query_ptr + batch * stride_qb + head * stride_qh, queries, num_queries, stride_qt, D, PADDED_D
            )
            scores, slope = scores_of(tl.dot(key, tl.trans(query), input_precision="ieee"), scale, softcap, SOFTCAP)
            weights = tl.where(kept, tl.exp2((scores - log_sum_exp[None, :]) * LOG2_E), 0.0)
            grad = load_rows(
                grad_output_ptr + batch * stride_gb + head * stride_gh, queries, num_queries, stride_gt, DV, PADDED_DV
            )
            grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
            agreement = tl.dot(value, tl.trans(grad), input_precision="ieee")
            grad_scores = tl.where(kept, weights * (agreement - delta[None, :]) * slope, 0.0)
            grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    store_rows(grad_key_ptr + kv_row * num_keys * D, grad_key * scale, keys, num_keys, D, PADDED_D)
    store_rows(grad_value_ptr + kv_row * num_keys * DV, grad_value, keys, num_keys, DV, PADDED_DV)
