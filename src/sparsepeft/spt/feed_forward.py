"""An FFN of a model made sparse: in the FFN's place, with the FFN's own projections inside."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsepeft.layers.router import InitialRouter, Router
from sparsepeft.models.sublayers import FeedForward, compute_feed_forward, drop
from sparsepeft.ops.load_balancing import routing_load_balancing_loss
from sparsepeft.ops.routed_ffn import Projection, exact_ffn, route, routed_ffn
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.projections import inner_tensors, read_projection
from sparsepeft.spt.state import SptState, copied_with_model


def make_sparse(
    feed_forward: FeedForward, start: InitialRouter | None, config: SptConfig, context: SparseContext
) -> SparseFeedForward:
    """What takes the place of an FFN: a routed one where there is a router, else an exact one."""
    if start is None:
        return ExactFeedForward(feed_forward, config, context)
    return RoutedFeedForward(feed_forward, start, config, context)


class SparseFeedForward(nn.Module):
    """A sparse FFN that holds the projections under the names they had, so that LoRA finds them.

    Args:
        feed_forward: the FFN it replaces.
        config: of this FFN.
        context: knows which positions are padding, how losses are scaled, and when the FFN is dense.

    Attributes:
        dense: compute as the dense model, whatever the settings say; may be switched at any time.
    """

    def __init__(self, feed_forward: FeedForward, config: SptConfig, context: SparseContext) -> None:
        super().__init__()
        self.config, self.context, self.dense = config, context, False
        self._names, self._is_decoder = feed_forward.names, feed_forward.is_decoder
        self._projection_names = feed_forward.projection_names
        self._activation = feed_forward.activation
        for name in feed_forward.projection_names:
            _place(self, name, feed_forward.part(name))
        for dropout in (self._names.inner_dropout, self._names.outer_dropout):
            if dropout is not None:
                setattr(self, dropout, getattr(feed_forward.owner, dropout))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseFeedForward:
        return copied_with_model(self, self.context, memo)

    @property
    def is_dense(self) -> bool:
        """Whether it computes as the dense model now."""
        return self.dense or self.context.is_dense(self.training)

    @property
    def neuron_order(self) -> Tensor | None:
        """The order that the neurons are in, (I,); None where it is the dense FFN's."""
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        mask = positions = None
        if self.training:
            mask = self.context.losses.mask_for(hidden_states, self._is_decoder)
            positions = self.context.positions_for(hidden_states, self._is_decoder)
        if self.is_dense:
            output = self._compute_densely(hidden_states)
        elif positions is None:
            output = self._compute_sparsely(mask, hidden_states)
        else:
            output = self._compute_in_parts(positions, mask, hidden_states)
        return drop(self, self._names.outer_dropout, output)

    def release(self) -> dict[str, nn.Module]:
        """Restore the order of the neurons and return the projections, by name."""
        return {name: self.get_submodule(name) for name in self._projection_names}

    @abstractmethod
    def _compute_sparsely(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        """What it computes of all positions, of which ``mask`` says which count: (..., D) -> (..., D)."""

    def _compute_densely(self, hidden_states: Tensor) -> Tensor:
        """What the FFN computes in the dense model, through the projections and what PEFT has put around them."""
        return compute_feed_forward(self, self._names._replace(outer_dropout=None), self._activation, hidden_states)

    def _compute_in_parts(self, positions: Tensor, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        """Dense at ``positions``, of the shape (...) of the states (..., D), and sparse at the others."""
        states, is_dense = hidden_states.flatten(0, -2), positions.flatten()
        order = torch.argsort(is_dense.int(), stable=True)
        num_sparse = len(order) - int(is_dense.sum())
        sparse, dense = states[order].split([num_sparse, len(order) - num_sparse])
        mask = None if mask is None else mask.flatten()[order[:num_sparse]]
        outputs = torch.cat([self._compute_sparsely(mask, sparse), self._compute_densely(dense)])
        return outputs[torch.argsort(order)].view(*hidden_states.shape[:-1], -1)

    def _arguments(self, adapter_names: list[str] | None) -> dict[str, Any]:
        """The arguments that both operators take, ``adapter_names`` as :func:`read_projection` takes them."""
        names = self._names

        def read(name: str) -> Projection:
            return read_projection(self.get_submodule(name), name, adapter_names)

        dropout: Any = 0.0 if names.inner_dropout is None else getattr(self, names.inner_dropout)
        return {
            "up": read(names.up),
            "down": read(names.down),
            "gate": None if names.gate is None else read(names.gate),
            "activation": self._activation,
            "dropout": getattr(dropout, "p", dropout) if self.training else 0.0,
        }


class ExactFeedForward(SparseFeedForward):
    """An FFN that is sparse in its backward pass alone, see :func:`sparsepeft.ops.exact_ffn`.

    Its blocks are neighbours, so weights stay as they are, and what is trained fits the dense model. In eval mode it is
    the dense FFN.
    """

    @property
    def is_dense(self) -> bool:
        """Whether it computes as the dense model now, gradients included."""
        return not self.training or super().is_dense

    def _compute_sparsely(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        num_active = int(self.config.num_active_blocks)
        return exact_ffn(
            hidden_states, num_blocks=self.config.num_blocks, num_active=num_active, **self._arguments(None)
        )


class RoutedFeedForward(SparseFeedForward):
    """An FFN of which a token uses the blocks that a router chooses, see :func:`sparsepeft.ops.routed_ffn`.

    Args:
        feed_forward: the FFN it replaces.
        start: of its router, of which every adapter trains a copy; the neurons are put into its order.
        config: of this FFN.
        context: see :class:`SparseFeedForward`.
    """

    def __init__(
        self, feed_forward: FeedForward, start: InitialRouter, config: SptConfig, context: SparseContext
    ) -> None:
        super().__init__(feed_forward, config, context)
        self.spt_router = SptState(Router(start), context)
        self._reorder(start.neuron_order)

    @property
    def neuron_order(self) -> Tensor:
        """The order that the neurons are in, (I,)."""
        order: Tensor = self.spt_router.original_module.neuron_order
        return order

    def release(self) -> dict[str, nn.Module]:
        """Restore the order of the neurons and return the projections, by name."""
        self._reorder(torch.argsort(self.neuron_order))
        return super().release()

    def _compute_densely(self, hidden_states: Tensor) -> Tensor:
        # With the router in the graph also where no token uses it: DDP waits for its gradients.
        trained = [p for p in self.spt_router.current.parameters() if p.requires_grad]
        if trained and self.training:
            nothing = torch.stack([0.0 * p.sum() for p in trained]).sum()
            hidden_states = self.context.losses.attach(hidden_states, nothing)
        return super()._compute_densely(hidden_states)

    def _compute_sparsely(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        return self.spt_router.by_row(partial(self._compute, mask), hidden_states)

    def _compute(
        self, mask: Tensor | None, router: Router, adapter_names: list[str] | None, hidden_states: Tensor
    ) -> Tensor:
        routing = route(hidden_states, router.weight, router.bias, num_active=int(self.config.num_active_blocks))
        if self.training and self.config.load_balancing_coef and routing.logits.requires_grad:
            loss = routing_load_balancing_loss(routing.logits, routing.blocks, mask)
            hidden_states = self.context.losses.attach(hidden_states, self.config.load_balancing_coef * loss)
        arguments = self._arguments(adapter_names)
        for part, update in router.updates.items():
            arguments[part] = arguments[part]._replace(lora=(*arguments[part].lora, update))
        output = routed_ffn(hidden_states, routing=routing, **arguments)
        return output if router.compensation is None else output + router.compensation(hidden_states)

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
