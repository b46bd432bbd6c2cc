"""Sparse form: each token meets only the children of its K parents; cost follows K, not P.

Gathering the selected children would read K * C keys and values per token. Instead the (token, parent) pairs are
grouped by parent, so that a parent's children meet all their tokens in one matrix product. The products run tile by
tile through reused buffers: nothing grows with N * K * D, and backward gathers again instead of remembering.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index

# Parents are scored for so many tokens at a time that a tile of scores has at most this many entries (16 MiB).
_SEARCH_ENTRIES = 1 << 22

# Slots per tile: large enough for efficient products, small enough that a tile's vectors stay in cache.
TILE_SLOTS = 2048
# Parents share a tile while at most this many slots are allocated per real pair.
_MAX_PADDING = 3


def memory_read_selected(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by grouping tokens under their selected parents; see :func:`memory_read`.

    All tensors share one dtype; ``x`` is (N, D). One opaque operator to ``torch.compile``.
    """
    output, _, _ = _read(x, parent_keys, child_keys, child_values, top_k, float(temperature))
    return output


@torch.library.custom_op("sparsepeft::memory_read_selected", mutates_args=())
def _read(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, (N, D), the selected parents and their gate, (N, K) each."""
    precise = softmax_dtype(x.dtype)
    selected, gate = _select(x, parent_keys, top_k)
    output = x.to(precise, copy=True)
    buffer = x.new_empty(TILE_SLOTS, x.shape[1])
    for tile in PairGroups(selected, len(parent_keys)).tiles(child_keys.shape[1]):
        tokens = tile.pairs // top_k
        _, weights = _attend(_gather(x, tokens, buffer), child_keys, gate, tile, temperature)
        read = _bmm(weights.to(x.dtype), child_values[tile.parents], buffer)
        output.index_add_(0, tokens.flatten(), read.flatten(0, 1).to(precise))
    return output.to(x.dtype), selected, gate


@_read.register_fake
def _(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    selected = x.new_empty((x.shape[0], top_k), dtype=torch.long)
    gate = x.new_empty((x.shape[0], top_k), dtype=softmax_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), selected, gate


@torch.library.custom_op("sparsepeft::memory_read_selected_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    x: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    selected: Tensor,
    gate: Tensor,
    temperature: float,
    need_x: bool,
    need_memory: bool,
) -> list[Tensor]:
    """Return the gradients of x, parent keys, child keys and child values; empty tensors for those not needed.

    With a_c = G . v_c, u = sum_c w_c v_c (so that G . u = sum_c w_c a_c) and softmax's own derivative:
    dv_c = g w_c G;  ds_c = g w_c (a_c - G . u) / temperature;  dg = G . u, and through the parents' softmax
    dlogit_p = g_p (G . u_p - sum_q g_q G . u_q).
    """
    precise, top_k = softmax_dtype(x.dtype), selected.shape[1]
    grad_x = grad_output.to(precise, copy=True) if need_x else x.new_empty(0)
    grad_keys, grad_values = (torch.zeros_like(t if need_memory else t[:0]) for t in (child_keys, child_values))
    grad_gate = torch.zeros_like(gate).flatten()
    x_buffer, grad_buffer = (x.new_empty(TILE_SLOTS, x.shape[1]) for _ in range(2))

    groups = PairGroups(selected, len(parent_keys))
    for tile in groups.tiles(child_keys.shape[1]):
        tokens = tile.pairs // top_k
        xs, grads = _gather(x, tokens, x_buffer), _gather(grad_output, tokens, grad_buffer)  # (parents, S, D)
        attention, weights = _attend(xs, child_keys, gate, tile, temperature)  # (parents, S, C)
        agreement = torch.bmm(grads, child_values[tile.parents].mT).to(precise)  # a_c
        read_agreement = (attention * agreement).sum(-1)  # G . u
        grad_gate.index_add_(0, tile.pairs.flatten(), (read_agreement * tile.real).flatten())
        grad_scores = (weights * (agreement - read_agreement.unsqueeze(-1)) / temperature).to(x.dtype)
        if need_memory:
            _add_products(grad_values, tile, weights.to(x.dtype), grads)
            _add_products(grad_keys, tile, grad_scores, xs)
        if need_x:
            grad_xs = _bmm(grad_scores, child_keys[tile.parents], grad_buffer)
            grad_x.index_add_(0, tokens.flatten(), grad_xs.flatten(0, 1).to(precise))

    grad_gate = grad_gate.view_as(gate)
    grad_logits = gate * (grad_gate - (gate * grad_gate).sum(-1, keepdim=True))  # (N, K)
    grad_parents = torch.zeros_like(parent_keys if need_memory else parent_keys[:0])
    if need_x:  # each token sums its parents ...
        grad_x += F.embedding_bag(selected, parent_keys.to(precise), mode="sum", per_sample_weights=grad_logits)
    if need_memory:  # ... and each parent its tokens
        grad_parents = F.embedding_bag(
            groups.order // top_k,
            x.to(precise),
            groups.starts,
            mode="sum",
            per_sample_weights=grad_logits.flatten()[groups.order],
        )
    return [grad.to(x.dtype) for grad in (grad_x, grad_parents, grad_keys, grad_values)]


@_backward.register_fake
def _(
    grad_output: Tensor,
    x: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    selected: Tensor,
    gate: Tensor,
    temperature: float,
    need_x: bool,
    need_memory: bool,
) -> list[Tensor]:
    memory = [torch.empty_like(t if need_memory else t[:0]) for t in (parent_keys, child_keys, child_values)]
    return [torch.empty_like(x) if need_x else x.new_empty(0), *memory]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, parent_keys, child_keys, child_values, _, ctx.temperature = inputs
    _, selected, gate = output
    ctx.save_for_backward(x, parent_keys, child_keys, child_values, selected, gate)


def _autograd(ctx: Any, grad_output: Tensor, _selected: Tensor, _gate: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_memory = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
    grads = _backward(grad_output.contiguous(), *ctx.saved_tensors, ctx.temperature, need_x, need_memory)
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    return *wanted, None, None


_read.register_autograd(_autograd, setup_context=_setup_context)


def _select(x: Tensor, parent_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the selected parents and the softmax over their scores, (N, K) each."""
    rows = max(1, _SEARCH_ENTRIES // len(parent_keys))
    best = [
        top_k_lowest_index(torch.mm(tile, parent_keys.T).to(softmax_dtype(x.dtype)), top_k) for tile in x.split(rows)
    ]
    scores, selected = (torch.cat(parts) for parts in zip(*best, strict=True))
    return selected, torch.softmax(scores, dim=-1)


def _attend(xs: Tensor, child_keys: Tensor, gate: Tensor, tile: PairTile, temperature: float) -> tuple[Tensor, Tensor]:
    """Return each pair's softmax over the children and the same times the pair's gate, (parents, S, C)."""
    scores = torch.bmm(xs, child_keys[tile.parents].mT).to(gate.dtype)
    attention = torch.softmax(scores / temperature, dim=-1)
    gates = gate.flatten()[tile.pairs] * tile.real  # a gate of zero silences the padding
    return attention, attention * gates.unsqueeze(-1)


def _add_products(total: Tensor, tile: PairTile, a: Tensor, b: Tensor) -> None:
    """Add ``a^T b`` of each of the tile's parents to its place in ``total``, (P, C, D)."""
    if isinstance(tile.parents, slice):
        total[tile.parents].baddbmm_(a.mT, b)
    else:
        total.index_add_(0, tile.parents, torch.bmm(a.mT, b))


# The two below write into a buffer: fresh memory for every tile costs more in page faults than the work itself.


def _gather(x: Tensor, tokens: Tensor, buffer: Tensor) -> Tensor:
    """Return ``x[tokens]``, (parents, S, D)."""
    return torch.index_select(x, 0, tokens.flatten(), out=buffer[: tokens.numel()]).view(*tokens.shape, -1)


def _bmm(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """Return ``a @ b``, (parents, S, D)."""
    return torch.bmm(a, b, out=buffer[: a.shape[0] * a.shape[1]].view(a.shape[0], a.shape[1], -1))


# (token, parent) pairs grouped by parent, and the tiles in which they are worked through.


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
