"""Portable PyTorch: the matrix products of a routed FFN, over tokens grouped by block.

Every weight is seen as G blocks of (W, D), W neurons of the inner dimension each: the rows of the up and gate
projections, the columns of the down projection. Three products are then all that forward and backward need.
"""

# ruff: noqa: D102 - what the methods of :class:`Products` do, it says itself

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype

# Rows of a product, at most: enough for full speed, few enough that they stay in a core's cache.
_SEGMENT_ROWS = 512
# In half precision oneDNN makes code for every number of rows that it meets, which takes longer than the product:
# only multiples of this occur.
_HALF_ROWS = 64
# Entries of (n, W) in a tile, about: what is done to each costs little beside its call if they are few.
_TILE_ENTRIES = 1 << 17


class Tile(NamedTuple):
    """Some pairs, sorted by block; and fillers between them, which are taken for other pairs but must add nothing."""

    slots: Tensor  # (n,), their places in the flattened (N, G') choice
    tokens: Tensor  # (n,), the token of each
    segments: Sequence[tuple[int, slice]] = ()  # a block and its rows of the tile, where the host knows
    is_filler: Tensor | None = None  # (n,) bool, if any is

    def pack(self, h: Tensor) -> Tensor:
        """Return the rows of ``h``, (n, W), that are no fillers."""
        return h if self.is_filler is None else h[~self.is_filler]

    def unpack(self, packed: Tensor) -> Tensor:
        """Undo :meth:`pack`, with zeros in the rows of fillers."""
        if self.is_filler is None:
            return packed
        result = packed.new_zeros(len(self.slots), *packed.shape[1:])
        result[~self.is_filler] = packed
        return result


class Groups:
    """The pairs of a choice ``blocks``, (N, G'), sorted by block and within a block by token."""

    def __init__(self, blocks: Tensor, num_blocks: int) -> None:
        self.num_active = blocks.shape[1]
        flat = blocks.flatten()
        self.blocks, self.order = torch.sort(flat, stable=True)
        self.counts = torch.bincount(flat, minlength=num_blocks)

    def whole(self) -> Tile:
        """Return all pairs as one tile."""
        return Tile(self.order, self.order // self.num_active)

    def split(self, block_size: int, multiple: int = 1) -> Iterator[Tile]:
        """Yield tiles of some segments each; a segment is of one block, and a block without tokens has none.

        Args:
            block_size: W.
            multiple: of which every segment's number of rows is one.
        """
        filled = (self.counts + multiple - 1) // multiple * multiple
        shift = (filled.cumsum(0) - filled) - (self.counts.cumsum(0) - self.counts)
        places = torch.arange(len(self.order), device=self.order.device) + shift[self.blocks]
        order = self.order.new_zeros(int(filled.sum())).index_copy_(0, places, self.order)
        is_filler = torch.ones_like(order, dtype=torch.bool).index_fill_(0, places, False)
        tokens, start, end, segments = order // self.num_active, 0, 0, []
        pieces = [
            (block, min(_SEGMENT_ROWS, count - first))
            for block, count in enumerate(filled.tolist())
            for first in range(0, count, _SEGMENT_ROWS)
        ]
        for place, (block, rows) in enumerate(pieces, 1):
            segments.append((block, slice(end - start, end - start + rows)))
            end += rows
            if (end - start) * block_size >= _TILE_ENTRIES or place == len(pieces):
                some = is_filler[start:end]
                yield Tile(order[start:end], tokens[start:end], segments, some if some.any() else None)
                start, segments = end, []


class Products(Protocol):
    """The products of one choice of blocks."""

    def tiles(self, block_size: int, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield tiles that cover every (token, block) pair once, in the same order each time, given W."""

    def without_fillers(self, tile: Tile, h: Tensor) -> Tensor:
        """Return ``h``, (n, W), with zeros in the rows that are fillers."""

    def inner(self, tile: Tile, x: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``x[token] @ weight[block]^T``, (n, W), for ``x`` (N, D) and ``weight`` (G, W, D).

        What is given as ``total`` is added, and may be written over.
        """

    def outer(self, tile: Tile, h: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``h @ weight[block]``, (n, D), for ``h`` (n, W); in an order for the next two alone.

        ``total``, of another such product, is as in :meth:`inner`.
        """

    def add_to_tokens(self, tile: Tile, total: Tensor, rows: Tensor) -> None:
        """Add what :meth:`outer` gave to ``total[token]``, (N, D)."""

    def agreement(self, tile: Tile, rows: Tensor, x: Tensor) -> Tensor:
        """Return the inner product of each row that :meth:`outer` gave and ``x[token]``, (n,)."""

    def add_gradient(self, tile: Tile, total: Tensor, h: Tensor, x: Tensor) -> None:
        """Add ``h^T x[token]`` to ``total[block]``, (G, W, D)."""

    def bias(self, tile: Tile, bias: Tensor) -> Tensor:
        """Return ``bias[block]``, for ``bias`` (G, W), in a shape that adds to (n, W)."""

    def add_bias_gradient(self, tile: Tile, total: Tensor, h: Tensor) -> None:
        """Add the sum of each block's rows of ``h`` to ``total[block]``, (G, W)."""


MakeProducts = Callable[[Groups], Products]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, in float32 at least."""
    precise = softmax_dtype(a.dtype)
    return (a.to(precise) * b.to(precise)).sum(-1)


def added(total: Tensor | None, product: Tensor) -> Tensor:
    """Return the product, added to the total where there is one."""
    return product if total is None else total.add_(product)


class _ScatteredRows:
    """Rows of :meth:`Products.outer` in the tile's order."""

    def add_to_tokens(self, tile: Tile, total: Tensor, rows: Tensor) -> None:
        total.index_add_(0, tile.tokens, rows.to(total.dtype))

    def agreement(self, tile: Tile, rows: Tensor, x: Tensor) -> Tensor:
        return row_dot(rows, x.index_select(0, tile.tokens))


class LoopedProducts(_ScatteredRows):
    """Segment after segment a plain matrix product. For CPUs, and for any dtype."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def tiles(self, block_size: int, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield tiles of a few segments each."""
        return self._groups.split(block_size, _HALF_ROWS if dtype.itemsize == 2 else 1)

    def without_fillers(self, tile: Tile, h: Tensor) -> Tensor:
        return h if tile.is_filler is None else h.masked_fill(tile.is_filler.unsqueeze(1), 0.0)

    def inner(self, tile: Tile, x: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        result = x.new_empty(len(tile.tokens), weight.shape[1]) if total is None else total
        for block, rows in tile.segments:
            of_tokens = x.index_select(0, tile.tokens[rows])
            _multiply(of_tokens, weight[block].to(x.dtype).t(), result[rows], add=total is not None)
        return result

    def outer(self, tile: Tile, h: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        result = h.new_empty(len(tile.tokens), weight.shape[2]) if total is None else total
        for block, rows in tile.segments:
            _multiply(h[rows], weight[block].to(h.dtype), result[rows], add=total is not None)
        return result

    def add_gradient(self, tile: Tile, total: Tensor, h: Tensor, x: Tensor) -> None:
        for block, rows in tile.segments:
            of_tokens = x.index_select(0, tile.tokens[rows])
            if total.dtype == h.dtype:
                total[block].addmm_(h[rows].t(), of_tokens)
            else:
                total[block].add_(torch.mm(h[rows].t(), of_tokens))

    def bias(self, tile: Tile, bias: Tensor) -> Tensor:
        return torch.cat([bias[block].expand(rows.stop - rows.start, -1) for block, rows in tile.segments])

    def add_bias_gradient(self, tile: Tile, total: Tensor, h: Tensor) -> None:
        for block, rows in tile.segments:
            total[block].add_(h[rows].sum(0))


def _multiply(a: Tensor, b: Tensor, result: Tensor, *, add: bool) -> None:
    if add:
        result.addmm_(a, b)
    else:
        torch.mm(a, b, out=result)


class OneTile:
    """All blocks at once; the host never waits for the counts."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._ends = groups.counts.cumsum(0).to(torch.int32)

    def tiles(self, block_size: int, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield one tile of all blocks."""
        if len(self._groups.order):
            yield self._groups.whole()

    def without_fillers(self, tile: Tile, h: Tensor) -> Tensor:
        return h

    def bias(self, tile: Tile, bias: Tensor) -> Tensor:
        return bias.index_select(0, self._groups.blocks)

    def add_bias_gradient(self, tile: Tile, total: Tensor, h: Tensor) -> None:
        total.index_add_(0, self._groups.blocks, h.to(total.dtype))


class GroupedProducts(OneTile, _ScatteredRows):
    """All blocks in one ``torch.nn.functional.grouped_mm``.

    That function takes float32, bfloat16 and float16 (on CUDA bfloat16), and rows of a multiple of 16 bytes: D and the
    ranks of updates are padded to it, W has to fit.
    """

    def inner(self, tile: Tile, x: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        rows = _pad_rows(x.index_select(0, tile.tokens))
        return added(total, F.grouped_mm(rows, _pad_rows(weight.to(x.dtype)).mT, offs=self._ends))

    def outer(self, tile: Tile, h: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        return added(total, F.grouped_mm(h, _pad_rows(weight.to(h.dtype)), offs=self._ends)[:, : weight.shape[2]])

    def add_gradient(self, tile: Tile, total: Tensor, h: Tensor, x: Tensor) -> None:
        rows = _pad_rows(x.index_select(0, tile.tokens))
        total.add_(F.grouped_mm(h.t(), rows, offs=self._ends)[..., : total.shape[2]])


def _pad_rows(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % row_multiple(tensor.dtype)))


def row_multiple(dtype: torch.dtype) -> int:
    """Return the number of entries of which ``grouped_mm`` wants a row to be a multiple."""
    return max(1, 16 // dtype.itemsize)


def choose_torch_products(device_type: str, dtype: torch.dtype, block_size: int) -> MakeProducts:
    """Return the faster of the two: grouped products are kernels of torch in bfloat16 on CUDA, and loops elsewhere."""
    is_grouped = device_type == "cuda" and dtype == torch.bfloat16 and block_size % row_multiple(dtype) == 0
    return GroupedProducts if is_grouped else LoopedProducts
