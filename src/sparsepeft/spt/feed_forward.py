"""An FFN of a model, routed: in the FFN's place, with the FFN's own projections inside."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sparsepeft.ops.load_balancing import routing_load_balancing_loss
from sparsepeft.ops.routed_ffn import LowRank, Projection, route, routed_ffn
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.router import Router, Start
from sparsepeft.spt.state import SptState
from sparsepeft.spt.structure import FeedForward, projections, weight_of
from sparsepeft.tuners._blocks import unwrap
from sparsepeft.tuners._context import ForwardContext, attach_loss


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
        self._activation = feed_forward.activation
        self.spt_router = SptState(Router(start))
        for name, projection in projections(feed_forward):
            _place(self, name, projection)
        for dropout in (self._names.inner_dropout, self._names.outer_dropout):
            if dropout is not None:
                _place(self, dropout, feed_forward.part(dropout))
        self._reorder(start.neuron_order)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        router: Router = self.spt_router.current
        names = self._names
        routing = route(hidden_states, router.weight, router.bias, num_active=self.config.num_active_blocks)
        if self.training and self.config.load_balancing_coef and routing.logits.requires_grad:
            mask = self.context.mask_for(hidden_states, self._is_decoder)
            loss = routing_load_balancing_loss(routing.logits, routing.blocks, mask)
            hidden_states = attach_loss(hidden_states, self.config.load_balancing_coef * loss, self.context)
        output = routed_ffn(
            hidden_states,
            self._projection(names.up),
            self._projection(names.down),
            routing,
            gate=None if names.gate is None else self._projection(names.gate),
            activation=self._activation,
            dropout=self._dropout(names.inner_dropout),
        )
        if router.compensation is not None:
            output = output + router.compensation(hidden_states)
        return output if names.outer_dropout is None else self.get_submodule(names.outer_dropout)(output)

    def release(self) -> dict[str, nn.Module]:
        """Put the neurons back into their order and give away the projections, by name."""
        self._reorder(torch.argsort(self.spt_router.original_module.neuron_order))
        found = [name for name in (self._names.gate, self._names.up, self._names.down) if name is not None]
        return {name: self.get_submodule(name) for name in found}

    def _projection(self, name: str) -> Projection:
        module = self.get_submodule(name)
        if module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            raise ValueError(
                f"Something acts on {name} from outside (adapter_names of a mixed batch, or offloading), "
                "but a routed FFN does not call it as a module; run the rows of one adapter at a time, on one device."
            )
        base: Any = unwrap(module)
        return Projection(weight_of(module), base.bias, tuple(_updates(module, name)))

    def _dropout(self, name: str | None) -> float:
        dropout: Any = None if name is None else self.get_submodule(name)
        return dropout.p if dropout is not None and self.training else 0.0

    @torch.no_grad()
    def _reorder(self, order: Tensor) -> None:
        """Permute the inner dimension of all weights, also LoRA's, in place."""
        for name in (self._names.gate, self._names.up):
            if name is not None:
                for tensor, dim in _inner(self.get_submodule(name), is_output=True):
                    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
        for tensor, dim in _inner(self.get_submodule(self._names.down), is_output=False):
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _updates(module: nn.Module, name: str) -> list[LowRank]:
    """LoRA's active updates of a projection.

    Raises:
        ValueError: an adapter of another kind acts on the projection.
    """
    if not isinstance(module, BaseTunerLayer):
        return []
    if module.disable_adapters or module.merged:
        return []
    if not isinstance(module, LoraLayer) or any(module.lora_variant.get(a) for a in module.active_adapters):
        raise ValueError(
            f"{name} of a routed FFN carries a {type(module).__name__} that is no plain LoRA; let it act on other "
            "modules (target_modules), or leave the FFNs dense with SptConfig(ffn=False)."
        )
    found = []
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            dropout: Any = module.lora_dropout[adapter]
            probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            down, up = module.lora_A[adapter], module.lora_B[adapter]
            found.append(LowRank(down.weight, up.weight, module.scaling[adapter], probability))
    return found


def _inner(projection: nn.Module, is_output: bool) -> list[tuple[Tensor, int]]:
    """The tensors of a projection that have the inner dimension, and where; for LoRA's both kinds are linear."""
    base: Any = unwrap(projection)
    found = [(weight_of(projection), 0 if is_output else 1)]  # a view: writing to it writes to the parameter
    if is_output and base.bias is not None:
        found.append((base.bias, 0))
    if isinstance(projection, LoraLayer):
        updates: Any = projection.lora_B if is_output else projection.lora_A
        found += [(update.weight, 0 if is_output else 1) for update in updates.values()]
    return found


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module under a dotted name."""
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else []:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
