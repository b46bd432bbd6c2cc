"""The products of a routed FFN as Triton kernels: gather and scatter are part of them, and nothing waits for the host.

The products that return to the tokens write a token's rows next to each other, so that adding them up is a sum over a
dimension: no atomics, and the same bits each time.
"""

# ruff: noqa: D102 - what the methods of :class:`Products` do, it says itself

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsepeft.ops.numerics import rows_contiguous
from sparsepeft.ops.routed_ffn.pytorch import OneTile, Tile, added, row_dot
from sparsepeft.ops.routed_ffn.triton_kernels import _grouped_bwd_kernel, _grouped_fwd_kernel


class TritonProducts(OneTile):
    """All blocks in one launch a product; float32, bfloat16 or float16, any sizes."""

    def inner(self, tile: Tile, x: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        x = rows_contiguous(x)
        return added(total, self._product(x, weight, x_rows=tile.tokens, y_rows=None))

    def outer(self, tile: Tile, h: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """See :class:`Products`; a token's rows stand next to each other."""
        return added(total, self._product(h.contiguous(), weight.mT, x_rows=None, y_rows=tile.slots))

    def add_to_tokens(self, tile: Tile, total: Tensor, rows: Tensor) -> None:
        total.add_(rows.unflatten(0, (len(total), -1)).sum(1, dtype=total.dtype))

    def agreement(self, tile: Tile, rows: Tensor, x: Tensor) -> Tensor:
        return row_dot(rows.unflatten(0, (len(x), -1)), x.unsqueeze(1)).flatten().index_select(0, tile.slots)

    def add_gradient(self, tile: Tile, total: Tensor, h: Tensor, x: Tensor) -> None:
        x = rows_contiguous(x)
        num_blocks, width, size = total.shape
        sizes = {"BLOCK_W": _tile_size(width, x.dtype), "BLOCK_D": _tile_size(size, x.dtype), "BLOCK_M": 32}
        grid = (num_blocks, triton.cdiv(width, sizes["BLOCK_W"]), triton.cdiv(size, sizes["BLOCK_D"]))
        with torch.cuda.device_of(x):
            _grouped_bwd_kernel[grid](
                *(h.contiguous(), x, total, self._ends, tile.tokens),
                *(width, size, x.stride(0), *total.stride()),
                num_warps=8,
                **sizes,
            )

    def _product(self, x: Tensor, weight: Tensor, *, x_rows: Tensor | None, y_rows: Tensor | None) -> Tensor:
        """Return ``x @ weight[block]^T`` for ``weight`` (G, N, K), rows of x gathered or of the result scattered."""
        num_rows, (num_blocks, size, _) = len(self._groups.order), weight.shape
        output = x.new_empty(num_rows, size)
        sizes = {"BLOCK_M": _largest_tile(x.dtype), "BLOCK_N": _tile_size(size, x.dtype), "BLOCK_K": 32}
        # Each block fills its last tile in part: at most one tile a block more than full tiles would be.
        grid = (num_rows // sizes["BLOCK_M"] + num_blocks, triton.cdiv(size, sizes["BLOCK_N"]))
        with torch.cuda.device_of(x):
            _grouped_fwd_kernel[grid](
                *(x, weight, output, self._ends, x_rows, y_rows),
                *(num_blocks, size, weight.shape[2], x.stride(0), *weight.stride()),
                GATHER=x_rows is not None,
                SCATTER=y_rows is not None,
                num_warps=8,
                **sizes,
            )
        return output


def _tile_size(size: int, dtype: torch.dtype) -> int:
    """Return the width of a tile: what a tensor core takes at least, what registers hold at most."""
    return min(max(triton.next_power_of_2(size), 16), _largest_tile(dtype))


def _largest_tile(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float32 else 128
