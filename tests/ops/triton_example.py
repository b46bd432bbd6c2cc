"""A kernel for testing the harness itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Sum each row after dividing the tile by its largest column sum: all of it has to be held at once."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :])
    x = x / tl.max(tl.sum(x, 0), 0) * ROWS
    tl.store(y_ptr + row, tl.sum(x, 1), mask=row < rows)
