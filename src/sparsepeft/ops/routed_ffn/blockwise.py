"""The routed FFN with tokens batched by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.routed_ffn.backward import enter, gradients
from sparsepeft.ops.routed_ffn.blocks import (
    Arguments,
    Draws,
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
from sparsepeft.ops.routed_ffn.pytorch import Groups, MakeProducts, Tile
from sparsepeft.ops.routed_ffn.routing import Routing


@torch.compiler.disable  # the sizes of the products depend on data
def routed_ffn_blockwise(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None,
    activation: Activation,
    routing: Routing,
    dropout: float,
    *,
    make_products: MakeProducts,
    recompute: bool,
) -> Tensor:
    """Compute the routed FFN of ``x``, (N, D), block by block; see :func:`routed_ffn`."""
    inlets = [up] if gate is None else [gate, up]
    tensors = differentiable(x, routing.log_weights, inlets, down)
    dropouts = (dropout, *(low.dropout for low in down.lora))
    plan = Plan(
        make_products=make_products,
        num_blocks=routing.logits.shape[-1],
        num_inlets=len(inlets),
        activation=activation,
        dropouts=dropouts,
        seed=draw_seed() if any(dropouts) else 0,
        keep=what_to_keep(tensors, len(inlets), activation, recompute=recompute),
    )
    output, *reads = _Routed.apply(plan, routing.blocks, *tensors)
    return add_updates(output, reads, down)


class _Routed(torch.autograd.Function):
    """Returns the output, (N, D), and what each update of the down projection reads, (N, r)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, blocks: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        arguments = Arguments.of(plan, tensors)
        x, precise = arguments.x, softmax_dtype(arguments.x.dtype)
        totals = [x.new_zeros(len(x), weight.shape[-1], dtype=precise) for weight in arguments.outlets]
        products, draws = plan.make_products(Groups(blocks, plan.num_blocks)), Draws(plan.seed, x.device)
        kept: list[Tensor] = []
        for tile in products.tiles(arguments.outlets[0].shape[1], x.dtype):
            inner = enter(products, tile, arguments)
            if plan.keep == "signs":
                kept.append(pack_signs(tile.pack(inner[0])))
            elif plan.keep == "inner":
                kept.extend(map(tile.pack, inner))
            active = plan.activate(inner)
            mask, *read_masks = draws.masks(active, plan.dropouts)
            active = products.without_fillers(tile, masked(active, mask))
            for total, weight, read_mask in zip(totals, arguments.outlets, [None, *read_masks], strict=True):
                rows = products.outer(tile, masked(active, read_mask), weight)
                products.add_to_tokens(tile, total, rows)
        ctx.plan, ctx.num_tensors = plan, len(tensors)
        ctx.save_for_backward(blocks, *tensors, *kept)
        return tuple(total.to(x.dtype) for total in totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        blocks, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], _KeptByTile(ctx.plan, saved[ctx.num_tensors :], blocks.device)
        with torch.autocast(blocks.device.type, enabled=False):
            return None, None, *gradients(ctx.plan, blocks, tensors, kept, ctx.needs_input_grad[2:], grad_outputs)


class _KeptByTile:
    """Tensors of each tile, in the order of the tiles; dropout is drawn again."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._plan, self._remaining = plan, iter(tensors)
        self._draws = Draws(plan.seed, device)

    def inner(self, tile: Tile) -> list[Tensor]:
        count = self._plan.num_inlets if self._plan.keep == "inner" else 0
        return [tile.unpack(next(self._remaining)) for _ in range(count)]

    def signs(self, tile: Tile, shape: tuple[int, ...]) -> Tensor:
        num_pairs = len(tile.pack(tile.slots))
        return tile.unpack(unpack_signs(next(self._remaining), (num_pairs, *shape[1:])))

    def masks(self, tile: Tile, like: Tensor) -> list[Tensor | None]:
        return self._draws.masks(like, self._plan.dropouts)
