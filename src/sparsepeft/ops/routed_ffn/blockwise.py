"""The routed FFN with tokens batched by block, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.routed_ffn.backward import TileBackward
from sparsepeft.ops.routed_ffn.blocks import (
    Arguments,
    Draws,
    Plan,
    draw_seed,
    masked,
    pack_signs,
    precise_places,
    unpack_signs,
)
from sparsepeft.ops.routed_ffn.projections import Activation, Projection, read_low_rank
from sparsepeft.ops.routed_ffn.pytorch import Groups, MakeProducts, Products, Tile
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
    """Compute the routed FFN of ``x``, (N, D), block by block; see :func:`routed_ffn`.

    What a low-rank update reads from x, and what it adds to the output, is small and dense: it stays outside of the
    function below, as does the down projection's bias.
    """
    inlets = [up] if gate is None else [gate, up]
    tensors: list[Tensor | None] = [x, routing.log_weights]
    for projection in inlets:
        reads = [read_low_rank(x, low) for low in projection.lora]
        low_ups = [low.up.to(x.dtype) for low in projection.lora]
        tensors += [projection.weight, projection.bias]
        tensors += [torch.cat(reads, 1), torch.cat(low_ups, 1)] if reads else [None, None]
    outlets = [down.weight, *(low.down.to(x.dtype) for low in down.lora)]
    tensors += outlets

    dropouts = (dropout, *(low.dropout for low in down.lora))
    plan = Plan(
        make_products=make_products,
        num_blocks=routing.logits.shape[-1],
        num_inlets=len(inlets),
        activation=activation,
        dropouts=dropouts,
        seed=draw_seed() if any(dropouts) else 0,
        keep=_what_to_keep(tensors, outlets, plain_relu=activation is F.relu and gate is None, recompute=recompute),
    )
    output, *reads = _Blockwise.apply(plan, routing.blocks, *tensors)
    for low, read in zip(down.lora, reads, strict=True):
        output = output + low.scaling * F.linear(read, low.up.to(x.dtype))
    return output if down.bias is None else output + down.bias.to(x.dtype)


def _what_to_keep(tensors: list[Any], outlets: list[Tensor], *, plain_relu: bool, recompute: bool) -> str:
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "nothing"
    # ReLU's derivative is a sign; its values matter where they meet a trainable weight.
    if plain_relu and not any(tensor.requires_grad for tensor in outlets):
        return "signs"
    return "nothing" if recompute else "inner"


class _Blockwise(torch.autograd.Function):
    """Returns the output, (N, D), and what each update of the down projection reads, (N, r)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, blocks: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        arguments = Arguments.of(plan, tensors)
        x, precise = arguments.x, softmax_dtype(arguments.x.dtype)
        totals = [x.new_zeros(len(x), weight.shape[-1], dtype=precise) for weight in arguments.outlets]
        products, draws = plan.make_products(Groups(blocks, plan.num_blocks)), Draws(plan.seed, x.device)
        kept: list[Tensor] = []
        for tile in products.tiles():
            inner = _enter(products, tile, arguments)
            if plan.keep == "signs":
                kept.append(pack_signs(inner[0]))
            elif plan.keep == "inner":
                kept.extend(inner)
            active = plan.activate(inner)
            mask, *read_masks = draws.masks(active, plan.dropouts)
            active = masked(active, mask)
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
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        with torch.autocast(blocks.device.type, enabled=False):
            return None, None, *_gradients(ctx.plan, blocks, tensors, kept, ctx.needs_input_grad[2:], grad_outputs)


def _gradients(
    plan: Plan,
    blocks: Tensor,
    tensors: list[Any],
    kept: list[Tensor],
    needed: tuple[bool, ...],
    grad_outputs: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Return the gradients of the differentiable arguments, None for those not needed."""
    arguments, precise_at = Arguments.of(plan, tensors), precise_places(plan)
    precise = softmax_dtype(arguments.x.dtype)
    grads: list[Any] = [
        torch.zeros_like(tensor, dtype=precise if index in precise_at else tensor.dtype) if need else None
        for index, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
    ]
    totals, remaining = Arguments.of(plan, grads), iter(kept)
    products, draws = plan.make_products(Groups(blocks, plan.num_blocks)), Draws(plan.seed, blocks.device)
    for tile in products.tiles():
        step = TileBackward(products, tile, arguments, totals)
        grad = products.inner(tile, grad_outputs[0], arguments.outlets[0])  # of the activation, (n, W)
        masks = draws.masks(grad, plan.dropouts)
        if plan.keep == "signs":
            grad = step.through_outlets(grad, grad_outputs, None, masks)
            grad.mul_(unpack_signs(next(remaining), grad.shape))
            step.through_inlets([grad], agreement_with_inputs=True)
            continue
        inner = [next(remaining) for _ in arguments.inlets] if kept else _enter(products, tile, arguments)
        inner = [tensor.detach().requires_grad_() for tensor in inner]
        with torch.enable_grad():
            active = plan.activate(inner)
        grad = step.through_outlets(grad, grad_outputs, active.detach(), masks)
        step.through_inlets(torch.autograd.grad(active, inner, grad), agreement_with_inputs=False)
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)]


def _enter(products: Products, tile: Tile, arguments: Arguments) -> list[Tensor]:
    """Return what enters the activation, (n, W) for each inlet."""
    entering = []
    for inlet in arguments.inlets:
        inner = products.inner(tile, arguments.x, inlet.weight)
        if inlet.reads is not None and inlet.low_up is not None:
            inner.add_(products.inner(tile, inlet.reads, inlet.low_up))
        if inlet.bias is not None:
            inner.add_(products.bias(tile, inlet.bias).to(inner.dtype))
        entering.append(inner)
    return entering
