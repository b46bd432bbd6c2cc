"""Bottleneck adapters (Pfeiffer, Houlsby) inside each Transformer layer, as a PEFT method."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from sparsepeft.arguments import check_choice, check_number
from sparsepeft.layers import BottleneckAdapter
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block, is_norm
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.sublayers import find_sublayer
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import BOTTLENECK, TaskAdapterConfig
from sparsepeft.tuners.layer import TaskTunerLayer

STYLES = ("pfeiffer", "houlsby")
_NON_LINEARITY = {"pfeiffer": "relu", "houlsby": "silu"}


@dataclass(repr=False)
class BottleneckConfig(TaskAdapterConfig):
    """Bottleneck adapters inside each Transformer layer, equal to those of AdapterHub's ``adapters`` 1.3.0.

    ``"pfeiffer"`` (its ``seq_bn``) has one adapter a layer, after the FFN; ``"houlsby"`` (``double_seq_bn``) two, after
    self-attention and after the FFN. With h a sublayer's output after dropout, x its residual input and LN the layer's
    own frozen norm behind the sum:

    - pfeiffer: ``LN(h + x + A(LN(h + x)))``; without such a norm (pre-LN models) ``h + x + A(h + x)``
    - houlsby: ``LN(x + h + A(h))``; in pre-LN models ``x + h + A(h)``

    Where a model applies dropout to h as a function and not as a module (BART, OPT, Whisper), Houlsby's adapter stands
    before that dropout instead of behind it, which differs in training alone.

    Args:
        style: ``"pfeiffer"`` or ``"houlsby"``.
        reduction_factor: the bottleneck is ``hidden_size // reduction_factor`` wide, at least 1.
        non_linearity: activation by its name in transformers; None is ReLU for pfeiffer, SiLU ("swish") for houlsby.
        initializer_range: standard deviation of fresh weights; a fresh adapter is therefore no identity.
        attention_module: for houlsby, the module in each layer that gives the attention sublayer's h; None finds it.
        ffn_module: the same for the FFN sublayer.
        (and those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a value is out of range or a name is unknown.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> backbone = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
        >>> config = BottleneckConfig(style="houlsby", reduction_factor=16, task_type="SEQ_CLS")
        >>> model = get_peft_model(backbone, config)
    """

    style: str = field(default="pfeiffer", metadata={"help": "'pfeiffer' or 'houlsby'."})
    reduction_factor: float = field(default=12, metadata={"help": "Hidden size over bottleneck."})
    non_linearity: str | None = field(default=None, metadata={"help": "Activation in the bottleneck."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of fresh weights."})
    attention_module: str | None = field(default=None, metadata={"help": "Where attention's output leaves a layer."})
    ffn_module: str | None = field(default=None, metadata={"help": "Where the FFN's output leaves a layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        check_choice("style", self.style, STYLES)
        check_number("reduction_factor", self.reduction_factor, above=0)
        if self.non_linearity is None:
            self.non_linearity = _NON_LINEARITY[self.style]
        check_choice("non_linearity", self.non_linearity, ACT2FN)
        check_number("initializer_range", self.initializer_range, least=0)

    def bottleneck_size(self, hidden_size: int) -> int:
        """The width of the middle for a layer of ``hidden_size``."""
        return max(1, int(hidden_size // self.reduction_factor))

    def parameter_formula(self, hidden_sizes: list[int]) -> tuple[str, int]:
        """The closed formula for the adapters' parameters, written out, and its value.

        Args:
            hidden_sizes: the width of each layer that gets adapters.
        """
        places = 1 if self.style == "pfeiffer" else 2
        count = places * sum(2 * d * self.bottleneck_size(d) + self.bottleneck_size(d) + d for d in hidden_sizes)
        symbols, before = ("(2db+b+d)L", "") if places == 1 else ("2(2db+b+d)L", "2·")
        if len(set(hidden_sizes)) != 1:
            return f"{symbols.removesuffix('L')} over all layers = {count:,}", count
        d, b = hidden_sizes[0], self.bottleneck_size(hidden_sizes[0])
        return f"{symbols} = {before}(2·{d}·{b}+{b}+{d})·{len(hidden_sizes)} = {count:,}", count


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
            if is_norm(module):
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
                # The norm's hook has run already in this pass; from the next one on it acts.
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


class BottleneckModel(TaskTuner):
    """Adds bottleneck adapters to a model; made by ``get_peft_model(model, BottleneckConfig(...))``."""

    prefix = "bottleneck_"
    layer_class = BottleneckLayer
