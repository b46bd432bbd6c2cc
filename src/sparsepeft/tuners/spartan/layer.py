"""A Transformer layer followed by a SPARTAN memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsepeft.layers import SparseMemory
from sparsepeft.ops.load_balancing import load_balancing_loss
from sparsepeft.tuners._blocks import Block
from sparsepeft.tuners._context import BASE, ForwardContext, attach_loss
from sparsepeft.tuners._heads import move_unless_meta
from sparsepeft.tuners.base import TaskTunerLayer
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
        self.spartan_memory = nn.ModuleDict()
        self.load_balancing_coef: dict[str, float] = {}
        self._handle = self.base_layer.register_forward_hook(self._after_layer, prepend=True)

    def detach(self) -> None:
        """Remove the hook, so that the wrapped layer stands alone again."""
        self._handle.remove()

    def update_layer(self, adapter_name: str, config: SpartanConfig) -> None:
        """Add a fresh memory for ``adapter_name``."""
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
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
        self.spartan_memory[adapter_name] = move_unless_meta(memory, device)
        self.load_balancing_coef[adapter_name] = config.load_balancing_coef
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states after the memory: the active adapter's, or each row's own in a mixed batch. (B, ..., D)."""
        if self.context.adapter_names is not None:
            return self._read_mixed(hidden_states)
        for name in self.active_adapters:
            if name in self.spartan_memory:
                return self._read_one(hidden_states, name)
        return hidden_states

    def _read_one(self, hidden_states: torch.Tensor, adapter_name: str) -> torch.Tensor:
        memory: Any = self.spartan_memory[adapter_name]
        coefficient = self.load_balancing_coef[adapter_name]
        if coefficient and self.training:
            states = hidden_states.transpose(0, self.batch_dim)
            mask = self.context.mask_for(states, self.is_decoder)
            loss = load_balancing_loss(states, memory.parent_keys, top_k=memory.top_k, mask=mask)
            hidden_states = attach_loss(hidden_states, coefficient * loss, self.context)
        return memory(hidden_states)

    def _read_mixed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        groups = self.context.rows(hidden_states.shape[self.batch_dim], hidden_states.device)
        if len(groups) == 1:
            (name,) = groups
            return self._read_one(hidden_states, name) if name in self.spartan_memory else hidden_states
        result = hidden_states.clone()
        by_row, result_by_row = hidden_states.transpose(0, self.batch_dim), result.transpose(0, self.batch_dim)
        for name, rows in groups.items():
            if name != BASE and name in self.spartan_memory:
                result_by_row[rows] = self._read_one(by_row[rows], name)
        return result

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if self.disable_adapters or not self.spartan_memory:
            return None
        if isinstance(output, torch.Tensor):
            return self.read(self._checked(output))
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
            return type(output)((self.read(self._checked(output[0])), *output[1:]))
        raise TypeError(
            f"{type(layer).__name__} returned {type(output).__name__}, but a memory can follow a layer that returns "
            "its hidden states, alone or first in a tuple; choose other target_modules."
        )

    def _checked(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self.base_layer).__name__} returned states of shape {tuple(hidden_states.shape)}, but its "
                f"memory was made for width {self.hidden_size}; choose target_modules whose outputs end in the hidden "
                "size."
            )
        return hidden_states
