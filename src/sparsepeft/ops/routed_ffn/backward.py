"""The backward pass through the blocks that each token uses, shared by the routed and the exact FFN.

The output is linear in each block's activation a, so <grad_output, the block's output> = <grad_a, a>: the gradient of
the block's log-weight. With ReLU that equals <grad_h, h> of what enters it, h = W x + b, hence
<W^T grad_h, x> + <grad_h, b>, and a need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.routed_ffn.blocks import Arguments, Inlet, Plan, masked, precise_places
from sparsepeft.ops.routed_ffn.pytorch import Groups, Products, Tile, row_dot


class Kept(Protocol):
    """What a forward pass has kept of the pairs of a tile; asked once a tile, in the order of the tiles."""

    def inner(self, tile: Tile) -> list[Tensor]:
        """Return what entered the activation, (n, W) for each inlet; nothing where it has to be computed again."""

    def signs(self, tile: Tile, shape: tuple[int, ...]) -> Tensor:
        """Return where it was positive, (n, W) of zeros and ones; asked instead of :meth:`inner`."""

    def masks(self, tile: Tile, like: Tensor) -> list[Tensor | None]:
        """Return dropout's factors for the activation and for each update of the down projection, (n, W)."""


def gradients(
    plan: Plan,
    blocks: Tensor,
    tensors: Sequence[Any],
    kept: Kept,
    needed: tuple[bool, ...],
    grad_outputs: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Return the gradients of the differentiable arguments, None for those not needed.

    Args:
        plan: of the forward pass.
        blocks: of each token, (N, G').
        tensors: the differentiable arguments, flat; see :meth:`Arguments.of`.
        kept: by the forward pass.
        needed: of each of ``tensors``, whether its gradient is.
        grad_outputs: of the output, (N, D), and of what the down projection's updates read, (N, r) each.
    """
    arguments, precise_at = Arguments.of(plan, tensors), precise_places(plan)
    precise = softmax_dtype(arguments.x.dtype)
    grads: list[Any] = [
        torch.zeros_like(tensor, dtype=precise if index in precise_at else tensor.dtype) if need else None
        for index, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
    ]
    totals = Arguments.of(plan, grads)
    products = plan.make_products(Groups(blocks, plan.num_blocks))
    for tile in products.tiles(arguments.outlets[0].shape[1], arguments.x.dtype):
        step = TileBackward(products, tile, arguments, totals)
        grad = products.inner(tile, grad_outputs[0], arguments.outlets[0])  # of the activation, (n, W)
        masks = kept.masks(tile, grad)
        if plan.keep == "signs":
            grad = step.through_outlets(grad, grad_outputs, None, masks)
            grad.mul_(kept.signs(tile, grad.shape))
            step.through_inlets([grad], agreement_with_inputs=True)
            continue
        inner = [t.detach().requires_grad_() for t in kept.inner(tile) or enter(products, tile, arguments)]
        with torch.enable_grad():
            active = plan.activate(inner)
        grad = step.through_outlets(grad, grad_outputs, active.detach(), masks)
        step.through_inlets(torch.autograd.grad(active, inner, grad), agreement_with_inputs=False)
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)]


def enter(products: Products, tile: Tile, arguments: Arguments) -> list[Tensor]:
    """Return what enters the activation of a tile's pairs, (n, W) for each inlet."""
    entering = []
    for inlet in arguments.inlets:
        inner = products.inner(tile, arguments.x, inlet.weight)
        if inlet.reads is not None and inlet.low_up is not None:
            inner = products.inner(tile, inlet.reads, inlet.low_up, inner)
        if inlet.bias is not None:
            inner.add_(products.bias(tile, inlet.bias).to(inner.dtype))
        entering.append(inner)
    return entering


class TileBackward(NamedTuple):
    """A tile, the arguments, and the gradients to add to: None where not needed."""

    products: Products
    tile: Tile
    arguments: Arguments
    totals: Arguments

    def through_outlets(
        self, grad: Tensor, grad_outputs: Sequence[Tensor], active: Tensor | None, masks: list[Tensor | None]
    ) -> Tensor:
        """Return the gradient of the activation, (n, W).

        Args:
            grad: the output's share of the gradient of the activation after dropout; overwritten.
            grad_outputs: of the output, (N, D), and of what the down projection's updates read, (N, r) each.
            active: the activation before dropout, where it is known.
            masks: dropout of the activation, then of each update's input.
        """
        products, tile, totals = self.products, self.tile, self.totals
        for grad_read, weight, mask in zip(grad_outputs[1:], self.arguments.outlets[1:], masks[1:], strict=True):
            if mask is None:
                grad = products.inner(tile, grad_read, weight, grad)
            else:
                grad.add_(products.inner(tile, grad_read, weight).mul_(mask))
        grad = products.without_fillers(tile, grad)
        if active is not None:
            dropped = products.without_fillers(tile, masked(active, masks[0]))
            for total, grad_output, mask in zip(totals.outlets, grad_outputs, [None, *masks[1:]], strict=True):
                if total is not None:
                    products.add_gradient(tile, total, masked(dropped, mask), grad_output)
            if totals.log_weights is not None:
                self._set_log_weights(row_dot(grad, dropped))
        return masked(grad, masks[0])

    def through_inlets(self, grads: Sequence[Tensor], *, agreement_with_inputs: bool) -> None:
        """Pass on the gradients of what enters the activation, (n, W) for each inlet.

        ``agreement_with_inputs`` says that the log-weights' gradients are still to be found, as <grad_h, h>.
        """
        agreement_with_inputs = agreement_with_inputs and self.totals.log_weights is not None
        of_x: Tensor | None = None  # of both inlets, so that they are scattered to their tokens together
        for inlet, total, grad in zip(self.arguments.inlets, self.totals.inlets, grads, strict=True):
            self._add_inlet_gradients(inlet, total, grad)
            shares = []
            for source, sink, weight in (
                (self.arguments.x, self.totals.x, inlet.weight),
                (inlet.reads, total.reads, inlet.low_up),
            ):
                if source is None or weight is None or (sink is None and not agreement_with_inputs):
                    continue
                is_of_x = source is self.arguments.x
                rows = self.products.outer(self.tile, grad, weight, of_x if is_of_x else None)
                if agreement_with_inputs:
                    shares.append(self.products.agreement(self.tile, rows, source))
                if is_of_x:
                    of_x = rows
                elif sink is not None:
                    self.products.add_to_tokens(self.tile, sink, rows)
            if agreement_with_inputs:
                if inlet.bias is not None:
                    shares.append(row_dot(grad, self.products.bias(self.tile, inlet.bias)))
                self._set_log_weights(sum(shares[1:], shares[0]))
        if of_x is not None and self.totals.x is not None:
            self.products.add_to_tokens(self.tile, self.totals.x, of_x)

    def _add_inlet_gradients(self, inlet: Inlet, total: Inlet, grad: Tensor) -> None:
        if total.weight is not None:
            self.products.add_gradient(self.tile, total.weight, grad, self.arguments.x)
        if total.low_up is not None and inlet.reads is not None:
            self.products.add_gradient(self.tile, total.low_up, grad, inlet.reads)
        if total.bias is not None:
            self.products.add_bias_gradient(self.tile, total.bias, grad)

    def _set_log_weights(self, values: Tensor) -> None:
        self.totals.log_weights.view(-1).index_add_(0, self.tile.slots, values)  # fillers add zeros
