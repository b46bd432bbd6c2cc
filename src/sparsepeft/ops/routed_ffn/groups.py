"""(token, block) pairs, sorted by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Some pairs, sorted by block: all of one block, or of all blocks where ``block`` is None."""

    block: int | None
    rows: slice  # their places in the sorted order
    slots: Tensor  # (n,), their places in the flattened (N, G') choice
    tokens: Tensor  # (n,), the token of each


class Groups:
    """The pairs of a choice ``blocks``, (N, G'), sorted by block and within a block by token."""

    def __init__(self, blocks: Tensor, num_blocks: int) -> None:
        self.num_active = blocks.shape[1]
        flat = blocks.flatten()
        self.blocks, self.order = torch.sort(flat, stable=True)
        self.counts = torch.bincount(flat, minlength=num_blocks)

    def whole(self) -> Tile:
        """Return all pairs as one tile."""
        return Tile(None, slice(0, len(self.order)), self.order, self.order // self.num_active)

    def split(self, max_rows: int) -> Iterator[Tile]:
        """Yield tiles of one block and at most ``max_rows`` pairs each; blocks without tokens have none."""
        tokens, end = self.order // self.num_active, 0
        for block, count in enumerate(self.counts.tolist()):
            start, end = end, end + count
            for first in range(start, end, max_rows):
                rows = slice(first, min(first + max_rows, end))
                yield Tile(block, rows, self.order[rows], tokens[rows])
