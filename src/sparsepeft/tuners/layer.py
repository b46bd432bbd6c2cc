"""One Transformer layer with adapters inside: what the layers of all methods share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sparsepeft.models.blocks import Block
from sparsepeft.models.context import DATA_PARALLEL_REFUSED, ForwardContext
from sparsepeft.tuners.head_copies import move_unless_meta

MERGE_REFUSED = (
    "This adapter cannot be merged into the backbone's weights: what it adds depends on each input and is no change of "
    "a weight. Keep it attached (it adds a few percent of time at most), or call unload() for the bare backbone."
)


class TaskTunerLayer(nn.Module, BaseTunerLayer):
    """Wraps one Transformer layer (``base_layer``) and looks like it from outside."""

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__()
        self.base_layer = block.module
        self.hidden_size, self.is_decoder, self.batch_dim = block.hidden_size, block.is_decoder, block.batch_dim
        self.is_tower = block.is_tower
        self.context = context
        self._active_adapter = []
        self._inference_mode = False
        self.merged_adapters = []
        self._handles: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's forward; adapters act inside it, through hooks."""
        return self.base_layer(*args, **kwargs)

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add a fresh adapter for ``adapter_name``."""

    def detach(self) -> None:
        """Remove the hooks, so that the wrapped layer stands alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add_adapter(self, container: nn.ModuleDict, adapter_name: str, adapter: nn.Module) -> None:
        """Put a fresh adapter where the wrapped layer computes."""
        container[adapter_name] = move_unless_meta(adapter, execution_device(self.base_layer))

    def by_row(
        self,
        container: nn.ModuleDict,
        apply: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        *others: torch.Tensor,
    ) -> torch.Tensor:
        """What the active adapter makes of the states, or in a mixed batch each row's own adapter.

        Args:
            container: the adapters at this place, by name; one that is not there leaves the states alone.
            apply: ``apply(adapter_name, hidden_states, *others)`` gives the new states.
            hidden_states: (B, ..., D), or with the batch where :attr:`batch_dim` says.
            others: further tensors with the same rows, handed on.

        Returns:
            Tensor of the shape of ``hidden_states``.
        """
        routing = self.context.call.routing
        if routing is None:
            names = [name for name in self.active_adapters if name in container]
            return apply(names[0], hidden_states, *others) if names else hidden_states
        num_rows = hidden_states.shape[self.batch_dim]
        groups = routing.rows(num_rows, hidden_states.device, is_tower=self.is_tower)
        if len(groups) == 1:
            (name,) = groups
            return apply(name, hidden_states, *others) if name in container else hidden_states
        result = hidden_states.clone()
        result_by_row = result.transpose(0, self.batch_dim)
        by_row = [tensor.transpose(0, self.batch_dim) for tensor in (hidden_states, *others)]
        for name, rows in groups.items():
            if name in container:
                parts = (tensor[rows].transpose(0, self.batch_dim) for tensor in by_row)
                result_by_row[rows] = apply(name, *parts).transpose(0, self.batch_dim)
        return result

    def change_states(self, module: nn.Module, output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """A module's output with its hidden states, alone or first in a tuple, changed.

        Raises:
            TypeError: there are none.
            ValueError: they have another width than this layer's.
        """
        states = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(states, torch.Tensor):
            raise TypeError(
                f"{type(module).__name__} returned {type(output).__name__}, but an adapter can follow a module that "
                "returns its hidden states, alone or first in a tuple; choose other target_modules."
            )
        if states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(module).__name__} returned states of shape {tuple(states.shape)}, but its adapter was made for "
                f"width {self.hidden_size}; choose target_modules whose outputs end in the hidden size."
            )
        return change(states) if states is output else type(output)((change(states), *output[1:]))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet: avoid endless recursion
                raise
            return getattr(self.base_layer, name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active here (none, where it does not extend this layer)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"The adapters {names} were to be active together, but each task has its own head, so one is active at "
                "a time; pass adapter_names=[...] to the forward call to answer a batch of several tasks."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self._inference_mode = inference_mode

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters of the whole model are switched off."""
        return self.context.disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters (of the whole model) on or off; frozen ones stay frozen."""
        self.context.set_enabled(enabled)
        for container in self.adapter_layer_names:
            getattr(self, container).requires_grad_(False)
        if enabled:
            self.set_adapter(self.active_adapters, inference_mode=self._inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see :meth:`TaskTuner._check_merge_allowed`."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _replicate_for_data_parallel(self) -> TaskTunerLayer:
        raise RuntimeError(DATA_PARALLEL_REFUSED)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An adapter between layers is no change of a weight."""
        return False

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # No dtype: PEFT would otherwise round a loaded float32 adapter to the backbone's dtype and back.
        return execution_device(base_layer), None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: where accelerate's hook says, if its parameters are offloaded, else where they are."""
    for inner in module.modules():
        device = getattr(getattr(inner, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), None)
