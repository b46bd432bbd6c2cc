"""Backward through one tile of the blockwise form.

The output is linear in each block's activation a, so <grad_output, the block's output> = <grad_a, a>: the gradient of
the block's log-weight. With ReLU that equals <grad_h, h> of what enters it, h = W x + b, hence
<W^T grad_h, x> + <grad_h, b>, and a need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sparsepeft.ops.routed_ffn.blocks import Arguments, Inlet, masked
from sparsepeft.ops.routed_ffn.pytorch import Products, Tile, row_dot


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
            grad.add_(masked(products.inner(tile, grad_read, weight), mask))
        if active is not None:
            dropped = masked(active, masks[0])
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
        for inlet, total, grad in zip(self.arguments.inlets, self.totals.inlets, grads, strict=True):
            self._add_inlet_gradients(inlet, total, grad)
            shares = []
            for source, sink, weight in (
                (self.arguments.x, self.totals.x, inlet.weight),
                (inlet.reads, total.reads, inlet.low_up),
            ):
                if source is None or weight is None or (sink is None and not agreement_with_inputs):
                    continue
                rows = self.products.outer(self.tile, grad, weight)
                if sink is not None:
                    self.products.add_to_tokens(self.tile, sink, rows)
                if agreement_with_inputs:
                    shares.append(self.products.agreement(self.tile, rows, source))
            if agreement_with_inputs:
                if inlet.bias is not None:
                    shares.append(row_dot(grad, self.products.bias(self.tile, inlet.bias)))
                self._set_log_weights(sum(shares[1:], shares[0]))

    def _add_inlet_gradients(self, inlet: Inlet, total: Inlet, grad: Tensor) -> None:
        if total.weight is not None:
            self.products.add_gradient(self.tile, total.weight, grad, self.arguments.x)
        if total.low_up is not None and inlet.reads is not None:
            self.products.add_gradient(self.tile, total.low_up, grad, inlet.reads)
        if total.bias is not None:
            self.products.add_bias_gradient(self.tile, total.bias, grad)

    def _set_log_weights(self, values: Tensor) -> None:
        self.totals.log_weights.view(-1).index_copy_(0, self.tile.slots, values)
