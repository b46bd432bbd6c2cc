"""(token, parent) pairs grouped by parent, and the tiles in which they are worked through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Slots per tile: large enough for efficient products, small enough that a tile's vectors stay in cache.
TILE_SLOTS = 2048
# Parents share a tile while at most this many slots are allocated per real pair.
_MAX_PADDING = 3


class PairTile(NamedTuple):
    """Some parents and the pairs of each, padded to a common number of slots S."""

    parents: slice | Tensor  # consecutive, or an index of shape (parents,)
    pairs: Tensor  # (parents, S), index into the flattened (N, K) selection; padding repeats some valid index
    real: Tensor  # (parents, S), false where padded


class TilePlan(NamedTuple):
    """A tile in numbers: pairs ``skip`` to ``skip + slots`` of each parent."""

    parents: slice | list[int]
    skip: int
    slots: int


class PairGroups:
    """The pairs of a selection, sorted by parent."""

    def __init__(self, selected: Tensor, num_parents: int) -> None:
        """Group the pairs of ``selected``, (N, K): the parents of every token."""
        flat = selected.flatten()
        self.order = flat.argsort(stable=True)
        self._counts = torch.bincount(flat, minlength=num_parents)
        self._ends = self._counts.cumsum(0)
        self.starts = self._ends - self._counts

    def tiles(self, num_children: int) -> Iterator[PairTile]:
        """Yield tiles that cover every pair exactly once."""
        device = self.order.device
        for plan in plan_tiles(self._counts.tolist(), max_scattered=TILE_SLOTS // num_children):
            parents = plan.parents if isinstance(plan.parents, slice) else torch.tensor(plan.parents, device=device)
            slot = self.starts[parents].unsqueeze(-1) + torch.arange(plan.skip, plan.skip + plan.slots, device=device)
            real = slot < self._ends[parents].unsqueeze(-1)
            yield PairTile(parents, self.order[slot.clamp_(max=len(self.order) - 1)], real)


def plan_tiles(counts: list[int], max_scattered: int) -> Iterator[TilePlan]:
    """Yield tiles that cover ``counts[p]`` pairs of each parent p.

    A parent with many pairs is cut into several tiles; parents with few share one. Such parents need not be
    neighbours: where skipped ones between them would waste too much, their keys are gathered, for at most
    ``max_scattered`` parents a tile.
    """
    touched = [parent for parent, count in enumerate(counts) if count]
    position = 0
    while position < len(touched):
        first, begin = touched[position], position
        slots = num_pairs = counts[first]
        position += 1
        if slots >= TILE_SLOTS:
            for skip in range(0, num_pairs, TILE_SLOTS):
                yield TilePlan(slice(first, first + 1), skip, min(TILE_SLOTS, num_pairs - skip))
            continue
        dense = True
        while position < len(touched):
            parent = touched[position]
            wider, more = max(slots, counts[parent]), num_pairs + counts[parent]
            allowed = min(TILE_SLOTS, _MAX_PADDING * more)
            still_dense = dense and wider * (parent + 1 - first) <= allowed
            num_parents = position + 1 - begin
            if wider * num_parents > allowed or not (still_dense or num_parents <= max_scattered):
                break
            slots, num_pairs, dense = wider, more, still_dense
            position += 1
        parents = touched[begin:position]
        yield TilePlan(slice(first, parents[-1] + 1) if dense else parents, 0, slots)
