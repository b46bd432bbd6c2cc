"""An FFN of a model, routed: in the FFN's place, with the FFN's own projections inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsepeft.models.context import ForwardContext, attach_loss
from sparsepeft.models.feed_forwards import FeedForward
from sparsepeft.ops.load_balancing import routing_load_balancing_loss
from sparsepeft.ops.routed_ffn import Projection, route, routed_ffn
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.projections import inner_tensors, read_projection
from sparsepeft.spt.router import Router, Start
from sparsepeft.spt.state import SptState


class RoutedFeedForward(nn.Module):
    """A routed FFN that holds the projections under the names they had, so that LoRA finds them.

    Args:
        feed_forward: the FFN it replaces.
        start: of its router, of which every adapter trains a copy; the neurons are put into its order.
        config: number of blocks, and the weight of the load-balancing loss.
        context: knows which positions are padding, and how losses are scaled.
    """

    def __init__(self, feed_forward: FeedForward, start: Start, config: SptConfig, context: ForwardContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self._names, self._is_decoder = feed_forward.names, feed_forward.is_decoder
        self._projection_names = feed_forward.projection_names
        self._activation = feed_forward.activation
        self.spt_router = SptState(Router(start), context)
        for name in feed_forward.projection_names:
            _place(self, name, feed_forward.part(name))
        for dropout in (self._names.inner_dropout, self._names.outer_dropout):
            if dropout is not None:
                _place(self, dropout, feed_forward.part(dropout))
        self._reorder(start.neuron_order)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        output = self.spt_router.by_row(self._compute, hidden_states)
        outer = self._names.outer_dropout
        return output if outer is None else self.get_submodule(outer)(output)

    def _compute(self, router: Router, adapter_names: list[str] | None, hidden_states: Tensor) -> Tensor:
        names = self._names
        routing = route(hidden_states, router.weight, router.bias, num_active=int(self.config.num_active_blocks))
        if self.training and self.config.load_balancing_coef and routing.logits.requires_grad:
            mask = self.context.mask_for(hidden_states, self._is_decoder)
            loss = routing_load_balancing_loss(routing.logits, routing.blocks, mask)
            hidden_states = attach_loss(hidden_states, self.config.load_balancing_coef * loss, self.context)

        def read(name: str) -> Projection:
            return read_projection(self.get_submodule(name), name, adapter_names)

        output = routed_ffn(
            hidden_states,
            read(names.up),
            read(names.down),
            routing,
            gate=None if names.gate is None else read(names.gate),
            activation=self._activation,
            dropout=self._dropout(names.inner_dropout),
        )
        return output if router.compensation is None else output + router.compensation(hidden_states)

    def release(self) -> dict[str, nn.Module]:
        """Put the neurons back into their order and give away the projections, by name."""
        self._reorder(torch.argsort(self.spt_router.original_module.neuron_order))
        return {name: self.get_submodule(name) for name in self._projection_names}

    def _dropout(self, name: str | None) -> float:
        dropout: Any = None if name is None else self.get_submodule(name)
        return dropout.p if dropout is not None and self.training else 0.0

    @torch.no_grad()
    def _reorder(self, order: Tensor) -> None:
        """Permute the inner dimension of all weights, also LoRA's, in place."""
        for name in self._projection_names:
            for tensor, dim in inner_tensors(self.get_submodule(name), name, name != self._names.down):
                tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module under a dotted name."""
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else []:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
