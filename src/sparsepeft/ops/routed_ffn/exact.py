"""The exact FFN: dense products forward, in chunks of tokens; backward block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsepeft.ops.routed_ffn.backward import gradients
from sparsepeft.ops.routed_ffn.blocks import (
    Arguments,
    Draws,
    Inlet,
    Plan,
    add_updates,
    differentiable,
    draw_seed,
    masked,
    pack_signs,
    unpack_signs,
    what_to_keep,
)
from sparsepeft.ops.routed_ffn.projections import Activation, Projection
from sparsepeft.ops.routed_ffn.pytorch import MakeProducts, Tile
from sparsepeft.ops.routed_ffn.routing import column_weights, largest_blocks

# Entries of (n, I) in a chunk of tokens: enough rows for products at full speed, few enough that memory is not felt.
_CHUNK_ENTRIES = {"cpu": 1 << 21}
_CHUNK_ENTRIES_ELSEWHERE = 1 << 26


@torch.compiler.disable  # the sizes of the products in backward depend on data
def exact_ffn_blockwise(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None,
    activation: Activation,
    num_blocks: int,
    num_active: int,
    dropout: float,
    *,
    make_products: MakeProducts,
    recompute: bool,
) -> Tensor:
    """Compute the exact FFN of ``x``, (N, D); see :func:`exact_ffn`."""
    inlets = [up] if gate is None else [gate, up]
    tensors = differentiable(x, None, inlets, down)
    dropouts = (dropout, *(low.dropout for low in down.lora))
    plan = Plan(
        make_products=make_products,
        num_blocks=num_blocks,
        num_inlets=len(inlets),
        activation=activation,
        dropouts=dropouts,
        seed=draw_seed() if any(dropouts) else 0,
        keep=what_to_keep(tensors, len(inlets), activation, recompute=recompute),
    )
    has_gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    output, *reads = _Exact.apply(plan, num_active if has_gradient else 0, *tensors)
    return add_updates(output, reads, down)


class _Exact(torch.autograd.Function):
    """Returns the output, (N, D), and what each update of the down projection reads, (N, r)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, num_active: int, *tensors: Any) -> tuple[Tensor, ...]:
        arguments = Arguments.of(plan, tensors)
        x = arguments.x
        inlets = [_cast(inlet, x.dtype) for inlet in arguments.inlets]
        outlets = [weight.flatten(0, 1).to(x.dtype) for weight in arguments.outlets]  # (I, D), then (I, r)
        outputs = tuple(x.new_empty(len(x), weight.shape[1]) for weight in outlets)
        store = _Store(plan, x, arguments.outlets[0], num_active) if num_active else None
        draws = Draws(plan.seed, x.device)
        chunk = max(1, _CHUNK_ENTRIES.get(x.device.type, _CHUNK_ENTRIES_ELSEWHERE) // len(outlets[0]))
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            inner = [_enter(inlet, x[rows], rows) for inlet in inlets]
            active = plan.activate(inner)
            masks = draws.masks(active, plan.dropouts)
            active = masked(active, masks[0])
            for output, weight, mask in zip(outputs, outlets, [None, *masks[1:]], strict=True):
                torch.mm(masked(active, mask), weight, out=output[rows])
            if store is not None:
                store.put(rows, inner, active, masks)
        if store is not None:
            ctx.plan, ctx.num_tensors = plan, len(tensors)
            ctx.save_for_backward(store.blocks, *tensors, *store.packed())
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        blocks, *saved = ctx.saved_tensors
        tensors, stored = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        kept = _KeptBySlot(plan, stored, (blocks.numel(), tensors[2].shape[0] // plan.num_blocks))
        with torch.autocast(blocks.device.type, enabled=False):
            return None, None, *gradients(plan, blocks.long(), tensors, kept, ctx.needs_input_grad[2:], grad_outputs)


def _cast(inlet: Inlet, dtype: torch.dtype) -> Inlet:
    """Return an inlet as a dense map in a dtype: weight (I, D), bias (I,), low_up (I, R)."""
    weight, bias, reads, low_up = inlet
    flat = [None if tensor is None else tensor.flatten(0, 1).to(dtype) for tensor in (weight, bias, low_up)]
    return Inlet(flat[0], flat[1], reads, flat[2])  # type: ignore[arg-type]


def _enter(inlet: Inlet, x: Tensor, rows: slice) -> Tensor:
    inner = F.linear(x, inlet.weight, inlet.bias)
    return inner if inlet.reads is None or inlet.low_up is None else inner.addmm_(inlet.reads[rows], inlet.low_up.t())


class _Store:
    """The choice of blocks, and what is kept of the chosen ones in the order of (N, G')."""

    def __init__(self, plan: Plan, x: Tensor, down: Tensor, num_active: int) -> None:
        num_pairs, width = len(x) * num_active, down.shape[1]
        self._plan, self._num_active = plan, num_active
        self._weights = column_weights(down)  # (G, W)
        self.blocks = x.new_empty(len(x), num_active, dtype=torch.int32)
        self._inner = [x.new_empty(num_pairs, width) for _ in range(plan.num_inlets if plan.keep == "inner" else 0)]
        num_bits = (plan.keep == "signs") + sum(probability > 0 for probability in plan.dropouts)
        self._bits = [x.new_empty(num_pairs, width, dtype=torch.bool) for _ in range(num_bits)]

    def put(self, rows: slice, inner: list[Tensor], active: Tensor, masks: list[Tensor | None]) -> None:
        """Choose the blocks of some tokens by their activation after dropout, and keep what is needed of them."""
        blocks = largest_blocks(active, self._weights, self._num_active)
        self.blocks[rows] = blocks
        places = blocks + torch.arange(len(blocks), device=blocks.device).unsqueeze(1) * self._plan.num_blocks
        pairs = slice(rows.start * self._num_active, rows.start * self._num_active + blocks.numel())
        sources = [*inner] if self._plan.keep == "inner" else []
        bits = [inner[0] > 0] if self._plan.keep == "signs" else []
        bits += [mask > 0 for mask in masks if mask is not None]
        for source, target in zip([*sources, *bits], [*self._inner, *self._bits], strict=True):
            cut = source.view(len(blocks) * self._plan.num_blocks, -1)
            torch.index_select(cut, 0, places.flatten(), out=target[pairs])

    def packed(self) -> list[Tensor]:
        """What to save: what entered the activation, or one bit for each; and one for each entry of dropout's masks."""
        return [*self._inner, *map(pack_signs, self._bits)]


class _KeptBySlot:
    """Undoes :class:`_Store` for each tile."""

    def __init__(self, plan: Plan, stored: Sequence[Tensor], shape: tuple[int, int]) -> None:
        count = plan.num_inlets if plan.keep == "inner" else 0
        self._inner, bits = stored[:count], iter([unpack_signs(packed, shape) for packed in stored[count:]])
        self._signs = next(bits) if plan.keep == "signs" else None
        self._dropouts = [(next(bits) if probability else None, 1 - probability) for probability in plan.dropouts]

    def inner(self, tile: Tile) -> list[Tensor]:
        return [tensor.index_select(0, tile.slots) for tensor in self._inner]

    def signs(self, tile: Tile, shape: tuple[int, ...]) -> Tensor:
        assert self._signs is not None
        return self._signs.index_select(0, tile.slots)

    def masks(self, tile: Tile, like: Tensor) -> list[Tensor | None]:
        return [
            None if bits is None else bits.index_select(0, tile.slots).to(like.dtype).div_(keep)
            for bits, keep in self._dropouts
        ]
