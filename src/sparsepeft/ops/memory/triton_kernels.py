"""Triton kernels of the memory: one program reads and writes a tile of tokens of one row of the batch.

Columns of scores: parents take ``PADDED_P`` columns, children ``PADDED_P * PADDED_C``, parent by parent; both paddings
are powers of two, so that a tile of children's scores can be seen as (tokens, parents, children). Padded parents have
a gate of zero and padded children an attention of zero.

A row without a memory (index -1) reads keys and values as zeros, and its weights are zero: the same code then copies
it. An index past the last memory makes the row NaN, as a check on the host would have to wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(
    index_ptr: tl.tensor, num_tiles: tl.tensor, num_memories: tl.tensor, HAS_INDEX: tl.constexpr, BLOCK_T: tl.constexpr
) -> tl.tensor:
    """Return this program's row, the first token of its tile, the row's memory and whether there is such a memory.

    All are scalars of 64 bits: they move the pointers once, and offsets within a tile or a memory need 32 bits.
    """
    row = tl.program_id(0) // num_tiles
    first_token = (tl.program_id(0) % num_tiles) * BLOCK_T
    memory = tl.load(index_ptr + row).to(tl.int64) if HAS_INDEX else row.to(tl.int64) * 0
    return row.to(tl.int64), first_token.to(tl.int64), memory, (memory >= 0) & (memory < num_memories)


@triton.jit
def _columns(P: tl.constexpr, C: tl.constexpr, PADDED_P: tl.constexpr, PADDED_C: tl.constexpr) -> tl.tensor:
    """Return the parents' columns, the children's place among the P * C real ones, and which of both are real."""
    parents = tl.arange(0, PADDED_P)
    columns = tl.arange(0, PADDED_P * PADDED_C)
    parent, child = columns // PADDED_C, columns % PADDED_C
    return parents, parents < P, parent * C + child, (parent < P) & (child < C)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """Add ``a @ b`` to a float32 tile; float32 operands keep all their bits, as in torch by default."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _is_kept(scores: tl.tensor, parents: tl.tensor, P: tl.constexpr, TOP_K: tl.constexpr) -> tl.tensor:
    """Whether a parent is among the ``TOP_K`` best of its token, (T, P); of equal scores the lowest index is kept.

    A parent's rank is the number of parents before it. NaN precedes nothing and follows nothing, so it is kept, and
    makes the gate of all the token's parents NaN.
    """
    rank = tl.zeros_like(scores).to(tl.int32)
    for other in range(P):
        score = tl.sum(tl.where(parents[None, :] == other, scores, 0.0), axis=1)[:, None]
        rank += ((score > scores) | ((score == scores) & (other < parents[None, :]))).to(tl.int32)
    return (rank < TOP_K) & (parents[None, :] < P)


@triton.jit
def _memory_fwd_kernel(
    x_ptr: tl.tensor,  # (B, T, D), strides below, D contiguous
    index_ptr: tl.tensor,  # (B,)
    parent_keys_ptr: tl.tensor,  # (A, P, D), contiguous as all below
    child_keys_ptr: tl.tensor,  # (A, P, C, D)
    child_values_ptr: tl.tensor,  # (A, P, C, D)
    y_ptr: tl.tensor,  # (B, T, D)
    gate_ptr: tl.tensor,  # (B, T, P), float32
    attention_ptr: tl.tensor,  # (B, T, P, C), float32
    num_tokens: tl.tensor,
    num_tiles: tl.tensor,
    num_memories: tl.tensor,
    stride_xb: tl.tensor,
    stride_xt: tl.tensor,
    temperature: tl.tensor,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SAVE: tl.constexpr,
) -> None:
    dtype = parent_keys_ptr.dtype.element_ty
    row, first_token, memory, present = _locate(index_ptr, num_tiles, num_memories, HAS_INDEX, BLOCK_T)
    parents, is_parent, children, is_child = _columns(P, C, PADDED_P, PADDED_C)
    tokens = tl.arange(0, BLOCK_T)
    in_tile = first_token + tokens < num_tokens
    x_ptr += row * stride_xb + first_token * stride_xt
    parent_keys_ptr += memory * P * D
    child_keys_ptr += memory * P * C * D
    child_values_ptr += memory * P * C * D
    output_token = row * num_tokens + first_token
    y_ptr += output_token * D

    # Scores of parents and children: the tile of x is read from memory here, and once more below, from the cache.
    parent_scores = tl.zeros((BLOCK_T, PADDED_P), tl.float32)
    child_scores = tl.zeros((BLOCK_T, PADDED_P * PADDED_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        x = tl.load(
            x_ptr + tokens[:, None] * stride_xt + d[None, :], mask=in_tile[:, None] & in_d[None, :], other=0.0
        ).to(dtype)
        keys = tl.load(
            parent_keys_ptr + parents[None, :] * D + d[:, None],
            mask=in_d[:, None] & is_parent[None, :] & present,
            other=0.0,
        )
        parent_scores = _dot(x, keys, parent_scores)
        keys = tl.load(
            child_keys_ptr + children[None, :] * D + d[:, None],
            mask=in_d[:, None] & is_child[None, :] & present,
            other=0.0,
        )
        child_scores = _dot(x, keys, child_scores)

    kept = is_parent[None, :]
    if TOP_K < P:
        kept = _is_kept(parent_scores, parents, P, TOP_K)
    best = tl.max(tl.where(kept, parent_scores, float("-inf")), axis=1)[:, None]
    gate = tl.where(kept, tl.exp(parent_scores - best), 0.0)
    gate = gate / tl.sum(gate, axis=1)[:, None]

    child_scores = tl.where((tl.arange(0, PADDED_P * PADDED_C) % PADDED_C < C)[None, :], child_scores, float("-inf"))
    child_scores = tl.reshape(child_scores / temperature, (BLOCK_T, PADDED_P, PADDED_C))
    attention = tl.exp(child_scores - tl.max(child_scores, axis=2)[:, :, None])
    attention = attention / tl.sum(attention, axis=2)[:, :, None]

    gate = tl.where(memory < 0, 0.0, tl.where(memory < num_memories, gate, float("nan")))
    attention = tl.where(memory < 0, 0.0, attention)
    weights = tl.reshape(gate[:, :, None] * attention, (BLOCK_T, PADDED_P * PADDED_C)).to(dtype)
    if SAVE:
        gate_ptr += output_token * P
        attention_ptr += output_token * P * C
        tl.store(gate_ptr + tokens[:, None] * P + parents[None, :], gate, mask=in_tile[:, None] & is_parent[None, :])
        tl.store(
            attention_ptr + tokens[:, None] * (P * C) + children[None, :],
            tl.reshape(attention, (BLOCK_T, PADDED_P * PADDED_C)),
            mask=in_tile[:, None] & is_child[None, :],
        )

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        mask = in_tile[:, None] & in_d[None, :]
        x = tl.load(x_ptr + tokens[:, None] * stride_xt + d[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(
            child_values_ptr + children[:, None] * D + d[None, :],
            mask=in_d[None, :] & is_child[:, None] & present,
            other=0.0,
        )
        y = _dot(weights, values, x)
        tl.store(y_ptr + tokens[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _memory_bwd_kernel(
    grad_ptr: tl.tensor,  # of y, (B, T, D), strides below, D contiguous
    index_ptr: tl.tensor,  # (B,)
    parent_keys_ptr: tl.tensor,  # (A, P, D), contiguous as all below
    child_keys_ptr: tl.tensor,  # (A, P, C, D)
    child_values_ptr: tl.tensor,  # (A, P, C, D)
    gate_ptr: tl.tensor,  # (B, T, P), float32
    attention_ptr: tl.tensor,  # (B, T, P, C), float32
    grad_x_ptr: tl.tensor,  # (B, T, D)
    grad_scores_ptr: tl.tensor,  # (B, T, P + P * C)
    weights_ptr: tl.tensor,  # (B, T, P * C)
    num_tokens: tl.tensor,
    num_tiles: tl.tensor,
    num_memories: tl.tensor,
    stride_gb: tl.tensor,
    stride_gt: tl.tensor,
    temperature: tl.tensor,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_MEMORY: tl.constexpr,
) -> None:
    """Write the gradients of x and of all scores, and the values' weights.

    With a = G . v, u = sum_c attention_c a_c, softmax's own derivative gives
    dscore_child = gate attention (a - u) / temperature;  dscore_parent = gate (u - sum_q gate_q u_q).
    """
    dtype = parent_keys_ptr.dtype.element_ty
    row, first_token, memory, present = _locate(index_ptr, num_tiles, num_memories, HAS_INDEX, BLOCK_T)
    parents, is_parent, children, is_child = _columns(P, C, PADDED_P, PADDED_C)
    tokens = tl.arange(0, BLOCK_T)
    in_tile = first_token + tokens < num_tokens
    grad_ptr += row * stride_gb + first_token * stride_gt
    parent_keys_ptr += memory * P * D
    child_keys_ptr += memory * P * C * D
    child_values_ptr += memory * P * C * D
    output_token = row * num_tokens + first_token
    gate_ptr += output_token * P
    attention_ptr += output_token * P * C

    agreement = tl.zeros((BLOCK_T, PADDED_P * PADDED_C), tl.float32)  # a
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        grad = tl.load(
            grad_ptr + tokens[:, None] * stride_gt + d[None, :], mask=in_tile[:, None] & in_d[None, :], other=0.0
        ).to(dtype)
        values = tl.load(
            child_values_ptr + children[None, :] * D + d[:, None],
            mask=in_d[:, None] & is_child[None, :] & present,
            other=0.0,
        )
        agreement = _dot(grad, values, agreement)

    parent_mask, child_mask = in_tile[:, None] & is_parent[None, :], in_tile[:, None] & is_child[None, :]
    gate = tl.load(gate_ptr + tokens[:, None] * P + parents[None, :], mask=parent_mask, other=0.0)
    attention = tl.load(attention_ptr + tokens[:, None] * (P * C) + children[None, :], mask=child_mask, other=0.0)
    attention = tl.reshape(attention, (BLOCK_T, PADDED_P, PADDED_C))
    agreement = tl.reshape(agreement, (BLOCK_T, PADDED_P, PADDED_C))
    read_agreement = tl.sum(attention * agreement, axis=2)  # u
    weights = gate[:, :, None] * attention
    grad_children = weights * (agreement - read_agreement[:, :, None]) / temperature
    grad_parents = gate * (read_agreement - tl.sum(gate * read_agreement, axis=1)[:, None])
    # Nothing of a row without a memory may stay, not even a NaN of its gradient.
    grad_children = tl.where(memory < 0, 0.0, tl.reshape(grad_children, (BLOCK_T, PADDED_P * PADDED_C))).to(dtype)
    grad_parents = tl.where(memory < 0, 0.0, grad_parents).to(dtype)
    if NEED_MEMORY:
        grad_scores = grad_scores_ptr + output_token * (P + P * C) + tokens[:, None] * (P + P * C)
        tl.store(grad_scores + parents[None, :], grad_parents, mask=parent_mask)
        tl.store(grad_scores + P + children[None, :], grad_children, mask=child_mask)
        weights = tl.reshape(weights, (BLOCK_T, PADDED_P * PADDED_C)).to(dtype)
        weights_ptr += output_token * P * C
        tl.store(weights_ptr + tokens[:, None] * (P * C) + children[None, :], weights, mask=child_mask)

    if NEED_X:
        grad_x_ptr += output_token * D
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            in_d = d < D
            mask = in_tile[:, None] & in_d[None, :]
            grad = tl.load(grad_ptr + tokens[:, None] * stride_gt + d[None, :], mask=mask, other=0.0).to(tl.float32)
            keys = tl.load(
                parent_keys_ptr + parents[:, None] * D + d[None, :],
                mask=in_d[None, :] & is_parent[:, None] & present,
                other=0.0,
            )
            grad = _dot(grad_parents, keys, grad)
            keys = tl.load(
                child_keys_ptr + children[:, None] * D + d[None, :],
                mask=in_d[None, :] & is_child[:, None] & present,
                other=0.0,
            )
            grad = _dot(grad_children, keys, grad)
            tl.store(grad_x_ptr + tokens[:, None] * D + d[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
