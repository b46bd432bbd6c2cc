"""A Transformer layer with bottleneck adapters inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from sparsepeft.layers import BottleneckAdapter
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.sublayers import find_sublayer
from sparsepeft.tuners.bottleneck.config import BottleneckConfig
from sparsepeft.tuners.layer import TaskTunerLayer


class BottleneckLayer(TaskTunerLayer):
    """One Transformer layer with the bottleneck adapters of all tasks that extend it.

    Houlsby's stand in hooks of the modules that give a sublayer's output (``bottleneck_attention``,
    ``bottleneck_ffn``), Pfeiffer's (``bottleneck_output``) in a hook of the norm that ends the layer, or without such a
    norm (pre-LN) of the layer itself. Which it is, is seen in the first pass: a layer that ends in a norm returns the
    very tensor that this norm returned.
    """

    adapter_layer_names = ("bottleneck_attention", "bottleneck_ffn", "bottleneck_output")

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__(block, context)
        self.bottleneck_attention = AdapterDict()
        self.bottleneck_ffn = AdapterDict()
        self.bottleneck_output = AdapterDict()
        self._places: dict[str, nn.Module] = {}  # where hooks stand; "end": the norm or layer that Pfeiffer's act in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's forward; adapters act inside it, through hooks."""
        layer: Any = self.base_layer
        is_known = "output" not in self._places or "end" in self._places
        if is_known or not getattr(layer, "gradient_checkpointing", False):
            return super().forward(*args, **kwargs)
        # transformers checkpoints the inside of a layer, which hides from the layer's own hook what made its last norm.
        layer.gradient_checkpointing = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = True

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add fresh adapters for ``adapter_name``.

        Raises:
            ValueError: a sublayer cannot be found.
        """
        if config.style == "pfeiffer":
            self._hook_output()
            containers = [self.bottleneck_output]
        else:
            self._hook_sublayer("attention", config.attention_module)
            self._hook_sublayer("ffn", config.ffn_module)
            containers = [self.bottleneck_attention, self.bottleneck_ffn]
        for container in containers:
            size = config.bottleneck_size(self.hidden_size)
            adapter = BottleneckAdapter(self.hidden_size, size, str(config.non_linearity), config.initializer_range)
            self.add_adapter(container, adapter_name, adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # -- Pfeiffer ----------------------------------------------------------------------------------------------------

    def _hook_output(self) -> None:
        if "output" in self._places:
            return
        if getattr(self.base_layer, "chunk_size_feed_forward", 0):
            raise ValueError(
                f"{type(self.base_layer).__name__} computes its FFN in chunks (chunk_size_feed_forward="
                f"{self.base_layer.chunk_size_feed_forward}), which hides the norm that the adapter needs; set it to 0 "
                "in the model's config."
            )
        self._places["output"] = self.base_layer
        self._handles.append(self.base_layer.register_forward_hook(self._after_layer, prepend=True))
        for module in self.base_layer.modules():
            if "norm" in type(module).__name__.lower():
                self._handles.append(module.register_forward_hook(self._after_norm))

    def _after_norm(self, norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.disable_adapters or not self.bottleneck_output or not args:
            return None
        if "end" not in self._places:
            self.context.call.last_norm = (norm, args[0], output)
        if norm is not self._places.get("end"):
            return None
        return self.by_row(self.bottleneck_output, partial(self._add_before_norm, norm), output, args[0])

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        call = self.context.call
        last_norm, call.last_norm = call.last_norm, None
        if self.disable_adapters or not self.bottleneck_output:
            return None
        return self.change_states(layer, output, partial(self._extend_output, last_norm))

    def _extend_output(
        self, last_norm: tuple[nn.Module, torch.Tensor, torch.Tensor] | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        if "end" not in self._places:
            self._places["end"] = self.base_layer
            if last_norm is not None and _is_same(last_norm[2], hidden_states):
                norm, summed, _ = last_norm
                self._places["end"] = norm
                # The norm's hook was passed before it was known; from now on it is the one to act.
                extended = self._after_norm(norm, (summed,), hidden_states)
                assert extended is not None
                return extended
        if self._places["end"] is not self.base_layer:
            return hidden_states
        return self.by_row(self.bottleneck_output, partial(self._add, self.bottleneck_output), hidden_states)

    def _add_before_norm(
        self, norm: nn.Module, adapter_name: str, hidden_states: torch.Tensor, summed: torch.Tensor
    ) -> torch.Tensor:
        # Not through __call__, whose hook would keep these tensors.
        normed: torch.Tensor = norm.forward(summed + self.bottleneck_output[adapter_name](hidden_states))
        return normed

    # -- Houlsby -----------------------------------------------------------------------------------------------------

    def _hook_sublayer(self, which: str, name: str | None) -> None:
        place = find_sublayer(self.base_layer, which, name)
        if which not in self._places:
            self._places[which] = place
            hook = partial(self._after_sublayer, f"bottleneck_{which}")
            self._handles.append(place.register_forward_hook(hook, prepend=True))
        elif self._places[which] is not place:
            raise ValueError(
                f"{which}_module={name!r} was given, but another adapter of this model has its {which} adapters "
                "elsewhere; use the same module for all."
            )

    def _after_sublayer(self, container: str, sublayer: nn.Module, args: tuple, output: Any) -> Any:
        adapters = getattr(self, container)
        if self.disable_adapters or not adapters:
            return None
        return self.change_states(sublayer, output, partial(self.by_row, adapters, partial(self._add, adapters)))

    def _add(self, adapters: nn.ModuleDict, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + adapters[adapter_name](hidden_states)


def _is_same(normed: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a layer returned what its last norm did."""
    # In float16 some models clamp the norm's output, which makes it another tensor with the same values.
    clamped = output.dtype == torch.float16 and normed.shape == output.shape
    return normed is output or (clamped and torch.allclose(normed, output, rtol=0, atol=0, equal_nan=True))
