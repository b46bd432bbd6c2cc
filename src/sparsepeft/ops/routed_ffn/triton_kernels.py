"""Triton kernels of the routed FFN: products over rows that are sorted by block, each with the weights of its block.

Gathering the rows from their tokens, or scattering them to their places, is part of the product. Which rows a program
has is found on the device, from where each block's rows end: the host launches as many programs as there can be tiles
of ``BLOCK_M`` rows, and those left over return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _grouped_fwd_kernel(
    x_ptr: tl.tensor,  # rows of length K, K contiguous
    weight_ptr: tl.tensor,  # (G, N, K), strides below
    y_ptr: tl.tensor,  # (S, N), contiguous
    ends_ptr: tl.tensor,  # (G,), where each block's rows end
    x_rows_ptr: tl.tensor,  # (S,), which row of x each sorted row is, if GATHER
    y_rows_ptr: tl.tensor,  # (S,), which row of y each sorted row goes to, if SCATTER
    num_blocks: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_x: tl.tensor,
    stride_wg: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y[row] = x[row] @ weight[block of row]^T."""
    # The block of this program's tile: counts tiles from block to block.
    tile = tl.program_id(0)
    block = tile * 0 - 1
    start = tile * 0
    end = tile * 0
    first_tile = tile * 0
    for candidate in range(num_blocks):
        candidate_end = tl.load(ends_ptr + candidate)
        candidate_start = tl.where(candidate > 0, tl.load(ends_ptr + tl.maximum(candidate - 1, 0)), 0)
        num_tiles = (candidate_end - candidate_start + BLOCK_M - 1) // BLOCK_M
        here = (tile >= first_tile) & (tile < first_tile + num_tiles)
        block = tl.where(here, candidate, block)
        start = tl.where(here, candidate_start + (tile - first_tile) * BLOCK_M, start)
        end = tl.where(here, candidate_end, end)
        first_tile += num_tiles
    if block < 0:
        return

    rows = start + tl.arange(0, BLOCK_M)
    in_block = rows < end
    x_rows = tl.load(x_rows_ptr + rows, mask=in_block, other=0) if GATHER else rows
    y_rows = tl.load(y_rows_ptr + rows, mask=in_block, other=0) if SCATTER else rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_tile = x_ptr + x_rows.to(tl.int64)[:, None] * stride_x
    weight_tile = weight_ptr + block.to(tl.int64) * stride_wg + n.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_tile + k[None, :], mask=in_block[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(
            weight_tile + k.to(tl.int64)[:, None] * stride_wk, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    y_tile = y_ptr + y_rows.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_tile, total.to(y_ptr.dtype.element_ty), mask=in_block[:, None] & (n < N)[None, :])


@triton.jit
def _grouped_bwd_kernel(
    h_ptr: tl.tensor,  # (S, W), contiguous
    x_ptr: tl.tensor,  # rows of length D, D contiguous
    total_ptr: tl.tensor,  # (G, W, D), strides below
    ends_ptr: tl.tensor,  # (G,)
    x_rows_ptr: tl.tensor,  # (S,)
    W: tl.tensor,
    D: tl.tensor,
    stride_x: tl.tensor,
    stride_tg: tl.tensor,
    stride_tw: tl.tensor,
    stride_td: tl.tensor,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """total[block] += h[rows of block]^T x[their tokens]."""
    block = tl.program_id(0)
    end = tl.load(ends_ptr + block)
    start = tl.where(block > 0, tl.load(ends_ptr + tl.maximum(block - 1, 0)), 0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        in_block = rows < end
        tokens = tl.load(x_rows_ptr + rows, mask=in_block, other=0).to(tl.int64)
        h = tl.load(
            h_ptr + rows.to(tl.int64)[None, :] * W + w[:, None], mask=(w < W)[:, None] & in_block[None, :], other=0.0
        )
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + d[None, :], mask=in_block[:, None] & (d < D)[None, :], other=0.0
        )
        product = tl.dot(h, x, product, input_precision="ieee")
    place = total_ptr + block.to(tl.int64) * stride_tg
    place += w.to(tl.int64)[:, None] * stride_tw + d.to(tl.int64)[None, :] * stride_td
    inside = (w < W)[:, None] & (d < D)[None, :]
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + product).to(total_ptr.dtype.element_ty), mask=inside)
