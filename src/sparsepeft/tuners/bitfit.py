"""BitFit: training the biases of the Transformer layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.tuners._adapters import AdapterDict
from sparsepeft.tuners._blocks import Block
from sparsepeft.tuners._context import ForwardContext
from sparsepeft.tuners._layer import TaskTunerLayer
from sparsepeft.tuners._registry import BITFIT
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import TaskAdapterConfig


@dataclass
class BitFitConfig(TaskAdapterConfig):
    """Trains the biases inside each Transformer layer (BitFit, arXiv:2106.10199), and the head.

    What is stored is each bias's difference from the backbone's, which starts at zero: a fresh adapter changes nothing,
    and the steps of Adam without weight decay are those of training the biases themselves. Biases outside the layers
    (of the embeddings' norm) stay as they are.

    Args:
        (those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a name is unknown; when attached, a layer has no biases.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BITFIT
        self._num_biases = 0  # counted when attached

    def parameter_formula(self, hidden_sizes: list[int]) -> tuple[str, int]:
        """The number of bias values in the layers; there is no closed formula across architectures."""
        return f"biases of {len(hidden_sizes)} layers = {self._num_biases:,}", self._num_biases


class BitFitLayer(TaskTunerLayer):
    """One Transformer layer whose biases each adapter shifts, in hooks of the modules that have them."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__(block, context)
        self.bitfit_bias = AdapterDict()
        self._sizes: dict[str, int] = {}
        for name, module in self.base_layer.named_modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter) and (isinstance(module, (nn.Linear, Conv1D)) or _is_norm(module)):
                key = name.replace(".", "-")  # parameters' names cannot have dots
                self._sizes[key] = bias.shape[0]
                self._handles.append(module.register_forward_hook(partial(self._shift, key), prepend=True))
        if not self._sizes:
            raise ValueError(
                f"{type(self.base_layer).__name__} has no biases that BitFit could train; use another method for this "
                "architecture."
            )

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        """Add shifts of zero for ``adapter_name``."""
        shifts = nn.ParameterDict({key: nn.Parameter(torch.zeros(size)) for key, size in self._sizes.items()})
        self.add_adapter(self.bitfit_bias, adapter_name, shifts)
        config._num_biases += sum(self._sizes.values())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _shift(self, key: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.disable_adapters or not self.bitfit_bias:
            return None
        routing = self.context.call.routing
        if routing is not None and output.shape[self.batch_dim] == 1 < len(routing.adapter_names):
            raise ValueError(
                f"{key.replace('-', '.')} of {type(self.base_layer).__name__} computes once for all rows of a batch, "
                "so its bias cannot be another in each row; answer the rows of each adapter in a batch of their own, "
                "with set_adapter."
            )
        return self.by_row(self.bitfit_bias, partial(self._add, key), output)

    def _add(self, key: str, adapter_name: str, output: torch.Tensor) -> torch.Tensor:
        shifts: Any = self.bitfit_bias[adapter_name]
        return output + shifts[key].to(output.dtype)


class BitFitModel(TaskTuner):
    """Gives each adapter its own biases; made by ``get_peft_model(model, BitFitConfig(...))``."""

    prefix = "bitfit_"
    layer_class = BitFitLayer


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
