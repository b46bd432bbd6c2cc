"""An FFN of a model, routed: in the FFN's place, with the FFN's own projections inside."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.models.blocks import unwrap
from sparsepeft.models.sublayers import FeedForward, weight_of
from sparsepeft.ops.load_balancing import routing_load_balancing_loss
from sparsepeft.ops.routed_ffn import LowRank, Projection, route, routed_ffn
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.router import InitialRouter, Router
from sparsepeft.spt.state import SptState, in_use
from sparsepeft.tuners.bitfit import BiasShift


def read_projection(module: nn.Module, name: str, adapter_names: list[str] | None) -> Projection:
    """A projection in the form that the op takes.

    Args:
        module: a linear layer, or what PEFT has put around it.
        name: for messages.
        adapter_names: None for the active adapters, else the one that a mixed batch names for the rows at hand.

    Raises:
        ValueError: something acts on it that would be lost.
    """
    is_hooked = adapter_names is None and len(module._forward_pre_hooks) > 0  # in a mixed batch PEFT hands on the names
    if isinstance(module, ModulesToSaveWrapper):
        module = in_use(module, adapter_names)
    if isinstance(module, BaseTunerLayer) and module.disable_adapters and module.merged:
        module.unmerge()  # as PEFT's own forward does
    base: Any = unwrap(module)
    shifts = [hook for hook in base._forward_hooks.values() if isinstance(hook, BiasShift)]
    is_hooked |= module is not base and len(base._forward_pre_hooks) > 0
    if is_hooked or len(base._forward_hooks) > len(shifts) or hasattr(base, "_hf_hook"):
        raise ValueError(
            f"Something acts on {name} from outside (a hook, or accelerate, which keeps weights elsewhere), but a "
            "routed FFN does not call it as a module; take the hook away and keep the model on one device, or leave "
            "the FFNs dense with SptConfig(ffn=False)."
        )
    updates, biases = _updates(module, name, adapter_names)
    biases = [base.bias, *(shift.of(adapter_names) for shift in shifts), *biases]
    present = [bias for bias in biases if bias is not None]
    return Projection(weight_of(base), sum(present[1:], present[0]) if present else None, tuple(updates))


def inner_tensors(module: nn.Module, name: str, is_output: bool) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a projection that have the inner dimension, and which of theirs it is.

    Args:
        module: a linear layer, or what PEFT has put around it.
        name: for messages.
        is_output: whether the inner dimension is the projection's output.

    Raises:
        ValueError: an adapter of another kind than LoRA is on it.
    """
    if isinstance(module, ModulesToSaveWrapper):
        for copied in (module.original_module, *module.modules_to_save.values()):
            yield from inner_tensors(copied, name, is_output)
        return
    base: Any = unwrap(module)
    weight_of(base)
    for part, dim in inner_dims(base, is_output).items():
        yield base.get_parameter(part), dim
    if isinstance(module, BaseTunerLayer):
        if not _is_plain_lora(module, list(module.lora_A) if isinstance(module, LoraLinear) else []):
            raise ValueError(_refusal(module, name))
        updates: Any = module.lora_B if is_output else module.lora_A
        for update in updates.values():
            for part, dim in inner_dims(update, is_output).items():
                yield update.get_parameter(part), dim


def inner_dims(linear: Any, is_output: bool) -> dict[str, int]:
    """For each parameter of a linear layer that has the inner dimension, which of its dimensions that is."""
    dims = {"weight": int(is_output == isinstance(linear, Conv1D))}  # nn.Linear holds (out, in), Conv1D (in, out)
    return dims | {"bias": 0} if is_output and linear.bias is not None else dims


def _updates(module: nn.Module, name: str, adapter_names: list[str] | None) -> tuple[list[LowRank], list[Any]]:
    """LoRA's updates of a projection, and of its bias."""
    if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
        return [], []
    if module.merged:
        if adapter_names is not None:
            raise ValueError("adapter_names was passed, but adapters are merged; call unmerge_adapter first.")
        return [], []
    names = [one for one in (adapter_names or module.active_adapters) if one in module._get_available_adapters()]
    if not names:
        return [], []
    if not _is_plain_lora(module, names):
        raise ValueError(_refusal(module, name))
    layer: Any = module
    updates, biases = [], []
    for adapter in names:
        dropout, down, up = layer.lora_dropout[adapter], layer.lora_A[adapter], layer.lora_B[adapter]
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        updates.append(LowRank(down.weight, up.weight, layer.scaling[adapter], probability))
        biases.append(None if up.bias is None else layer.scaling[adapter] * up.bias)
    return updates, biases


def _is_plain_lora(module: nn.Module, adapter_names: list[str]) -> bool:
    return type(module) is LoraLinear and not any(name in module.lora_variant for name in adapter_names)


def _refusal(module: nn.Module, name: str) -> str:
    kind = f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"  # ia3.Linear, lora.ParamWrapper
    kind = ", ".join(
        [kind, *sorted({type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()})]
    )
    return (
        f"{name} of a routed FFN carries an adapter that is no plain LoRA ({kind}); let it act on other modules "
        "(target_modules), or leave the FFNs dense with SptConfig(ffn=False)."
    )


class RoutedFeedForward(nn.Module):
    """A routed FFN that holds the projections under the names they had, so that LoRA finds them.

    Args:
        feed_forward: the FFN it replaces.
        start: of its router, of which every adapter trains a copy; the neurons are put into its order.
        config: number of blocks, and the weight of the load-balancing loss.
        context: knows which positions are padding, how losses are scaled, and when the FFN is dense.

    Attributes:
        dense: compute as the dense model, whatever the settings say; may be switched at any time.
    """

    def __init__(
        self, feed_forward: FeedForward, start: InitialRouter, config: SptConfig, context: SparseContext
    ) -> None:
        super().__init__()
        self.config, self.context, self.dense = config, context, False
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

    @property
    def is_dense(self) -> bool:
        """Whether it computes as the dense model now."""
        return self.dense or self.context.is_dense(self.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        mask = positions = None
        if self.training:
            mask = self.context.losses.mask_for(hidden_states, self._is_decoder)
            positions = self.context.positions_for(hidden_states, self._is_decoder)
        if self.is_dense:
            output = self._compute_densely(self._with_router(hidden_states))
        elif positions is None:
            output = self.spt_router.by_row(partial(self._compute, mask), hidden_states)
        else:
            output = self._compute_in_parts(positions, mask, self._with_router(hidden_states))
        outer = self._names.outer_dropout
        return output if outer is None else self.get_submodule(outer)(output)

    def _with_router(self, hidden_states: Tensor) -> Tensor:
        """The states, with the router in their graph also where no token uses it: DDP waits for its gradients."""
        trained = [p for p in self.spt_router.current.parameters() if p.requires_grad]
        if not trained or not self.training:
            return hidden_states
        return self.context.losses.attach(hidden_states, torch.stack([0.0 * p.sum() for p in trained]).sum())

    def _compute_densely(self, hidden_states: Tensor) -> Tensor:
        """What the FFN computes in the dense model, through the projections and what PEFT has put around them."""
        names = self._names
        inner = self._activation(self.get_submodule(names.gate or names.up)(hidden_states))
        if names.gate is not None:
            inner = inner * self.get_submodule(names.up)(hidden_states)
        if names.inner_dropout is not None:
            inner = self.get_submodule(names.inner_dropout)(inner)
        output: Tensor = self.get_submodule(names.down)(inner)
        return output

    def _compute_in_parts(self, positions: Tensor, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        """Dense at ``positions``, of the shape (...) of the states (..., D), and sparse at the others."""
        states, is_dense = hidden_states.flatten(0, -2), positions.flatten()
        order = torch.argsort(is_dense.int(), stable=True)
        num_sparse = len(order) - int(is_dense.sum())
        sparse, dense = states[order].split([num_sparse, len(order) - num_sparse])
        mask = None if mask is None else mask.flatten()[order[:num_sparse]]
        outputs = torch.cat([self._compute(mask, self.spt_router.current, None, sparse), self._compute_densely(dense)])
        return outputs[torch.argsort(order)].view(*hidden_states.shape[:-1], -1)

    def _compute(
        self, mask: Tensor | None, router: Router, adapter_names: list[str] | None, hidden_states: Tensor
    ) -> Tensor:
        names = self._names
        routing = route(hidden_states, router.weight, router.bias, num_active=int(self.config.num_active_blocks))
        if self.training and self.config.load_balancing_coef and routing.logits.requires_grad:
            loss = routing_load_balancing_loss(routing.logits, routing.blocks, mask)
            hidden_states = self.context.losses.attach(hidden_states, self.config.load_balancing_coef * loss)

        def read(part: str, name: str) -> Projection:
            projection = read_projection(self.get_submodule(name), name, adapter_names)
            return projection._replace(lora=(*projection.lora, updates[part])) if part in updates else projection

        updates = router.updates
        output = routed_ffn(
            hidden_states,
            read("up", names.up),
            read("down", names.down),
            routing,
            gate=None if names.gate is None else read("gate", names.gate),
            activation=self._activation,
            dropout=self._dropout(names.inner_dropout),
        )
        return output if router.compensation is None else output + router.compensation(hidden_states)

    def release(self) -> dict[str, nn.Module]:
        """Restore the order of the neurons and return the projections, by name."""
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
