"""A Transformer layer followed by a SPARTAN memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsepeft.layers import SparseMemory
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block
from sparsepeft.models.context import ForwardContext, attach_loss
from sparsepeft.ops.load_balancing import load_balancing_loss
from sparsepeft.tuners.layer import TaskTunerLayer
from sparsepeft.tuners.spartan.config import SpartanConfig


class SpartanLayer(TaskTunerLayer):
    """One Transformer layer with the memories of all adapters that extend it.

    The memory is read in a forward hook of the layer, put before all others, so that whoever records the layer's
    output (``output_hidden_states``) sees the states after the memory.
    """

    adapter_layer_names = ("spartan_memory",)
    other_param_names = ("load_balancing_coef",)

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__(block, context)
        self.spartan_memory = AdapterDict()
        self.load_balancing_coef: dict[str, float] = {}
        self._handles = [self.base_layer.register_forward_hook(self._after_layer, prepend=True)]

    def update_layer(self, adapter_name: str, config: SpartanConfig) -> None:
        """Add a fresh memory for ``adapter_name``."""
        memory = SparseMemory(
            self.hidden_size,
            config.num_parents,
            config.num_children,
            config.top_k,
            temperature=config.temperature,
            initializer_range=config.initializer_range,
            value_initializer_range=config.value_initializer_range,
            impl=config.impl,
        )
        self.add_adapter(self.spartan_memory, adapter_name, memory)
        self.load_balancing_coef[adapter_name] = config.load_balancing_coef
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states after the memory: the active adapter's, or each row's own in a mixed batch. (B, ..., D)."""
        return self.by_row(self.spartan_memory, self._read_one, hidden_states)

    def _read_one(self, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        memory: Any = self.spartan_memory[adapter_name]
        coefficient = self.load_balancing_coef[adapter_name]
        if coefficient and self.training and torch.is_grad_enabled():
            states = hidden_states.transpose(0, self.batch_dim)
            mask = self.context.mask_for(states, self.is_decoder)
            loss = load_balancing_loss(states, memory.parent_keys, top_k=memory.top_k, mask=mask)
            hidden_states = attach_loss(hidden_states, coefficient * loss, self.context)
        return memory(hidden_states)

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if self.disable_adapters or not self.spartan_memory:
            return None
        return self.change_states(layer, output, self.read)
