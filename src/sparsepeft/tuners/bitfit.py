"""BitFit: training the biases of the Transformer layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block, is_norm
from sparsepeft.models.context import ForwardContext, computed_once
from sparsepeft.models.nested import tensors_in
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import BITFIT, TaskAdapterConfig
from sparsepeft.tuners.layer import TaskTunerLayer


@dataclass(repr=False)
class BitFitConfig(TaskAdapterConfig):
    """Trains the biases inside each Transformer layer (BitFit, arXiv:2106.10199), and the head.

    What is stored is each bias's difference from the backbone's, which starts at zero: a fresh adapter changes nothing,
    and the steps of Adam without weight decay are those of training the biases themselves. Biases outside the layers
    (of the embeddings' norm) stay as they are.

    Args:
        (those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a name is unknown; when attached, a layer has no biases.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> backbone = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
        >>> model = get_peft_model(backbone, BitFitConfig(task_type="SEQ_CLS"))
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BITFIT


class BitFitLayer(TaskTunerLayer):
    """One Transformer layer whose biases each adapter shifts, in hooks of the modules that have them."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__(block, context)
        self.bitfit_bias = AdapterDict()
        self._sizes: dict[str, int] = {}
        for name, module in self.base_layer.named_modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter) and (isinstance(module, (nn.Linear, Conv1D)) or is_norm(module)):
                key = name.replace(".", "-")  # parameters' names cannot have dots
                self._sizes[key] = bias.shape[0]
                self._handles.append(module.register_forward_hook(BiasShift(self, key), prepend=True))
        if not self._sizes:
            raise ValueError(
                f"{type(self.base_layer).__name__} has no biases that BitFit could train; use another method for this "
                "architecture."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's forward, whose biases are shifted inside it."""
        if self.context.call.routing is not None:
            self.context.call.layer_shape = next(tensors_in([args, kwargs])).shape
        return super().forward(*args, **kwargs)

    def has_rows(self, output: torch.Tensor) -> bool:
        """Whether the output of a module in this layer has the batch's rows where the layer's states have them.

        Longformer's attention turns its states from (B, T, D) to (T, B, D), and a layer of experts hands each some of
        the tokens.

        Args:
            output: (B, ..., D), or of a flat batch (B T, D).
        """
        shape = self.context.call.layer_shape
        if shape is None or len(shape) < 3:
            return output.shape[self.batch_dim] > 1
        num_rows = shape[self.batch_dim]
        if output.dim() == 2:
            return output.shape[0] == shape[:-1].numel()
        turned = shape[:-1] != shape[-2::-1] == output.shape[:-1]
        return output.shape[self.batch_dim] % num_rows == 0 and not turned

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        """Add shifts of zero for ``adapter_name``."""
        shifts = nn.ParameterDict({key: nn.Parameter(torch.zeros(size)) for key, size in self._sizes.items()})
        self.add_adapter(self.bitfit_bias, adapter_name, shifts)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def shift(self, key: str, adapter_name: str) -> torch.Tensor | None:
        """What an adapter adds to a bias; None if it leaves the bias unchanged."""
        if self.disable_adapters or adapter_name not in self.bitfit_bias:
            return None
        shifts: Any = self.bitfit_bias[adapter_name]
        tensor: torch.Tensor = shifts[key]
        return tensor


class BiasShift:
    """The hook that shifts one bias. A routed FFN, which computes projections itself, asks it for the shift."""

    def __init__(self, layer: BitFitLayer, key: str) -> None:
        self.layer, self.key = layer, key

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """A module's output, shifted; see ``register_forward_hook``."""
        layer = self.layer
        if layer.disable_adapters or not layer.bitfit_bias:
            return None
        routing = layer.context.call.routing
        if routing is not None and not layer.has_rows(output):
            if routing.is_mixed:
                raise computed_once(f"{self.key.replace('-', '.')} of {type(layer.base_layer).__name__}")
            return self._add(routing.adapter_names[0], output)
        return layer.by_row(layer.bitfit_bias, self._add, output)

    def of(self, adapter_names: list[str] | None) -> torch.Tensor | None:
        """The shift of the active adapter, or of the named one."""
        names = self.layer.active_adapters if adapter_names is None else adapter_names
        return self.layer.shift(self.key, names[0]) if names else None

    def _add(self, adapter_name: str, output: torch.Tensor) -> torch.Tensor:
        shift = self.layer.shift(self.key, adapter_name)
        return output if shift is None else output + shift.to(output.dtype)


class BitFitModel(TaskTuner):
    """Gives each adapter its own biases; made by ``get_peft_model(model, BitFitConfig(...))``."""

    prefix = "bitfit_"
    layer_class = BitFitLayer

    def parameter_formula(self, adapter_name: str = "default") -> tuple[str, int]:
        """The number of bias values in the layers; there is no closed formula across architectures."""
        layers = [m.bitfit_bias for m in self.model.modules() if isinstance(m, BitFitLayer)]
        counts = [[p.numel() for p in layer[adapter_name].parameters()] for layer in layers if adapter_name in layer]
        count = sum(map(sum, counts))
        return f"biases of {len(counts)} layers = {count:,}", count
