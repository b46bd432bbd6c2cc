"""Linear layers by oneDNN.

In float32 PyTorch asks MKL, which on some processors reaches half of its speed; in bfloat16 it asks oneDNN too, but for
a product in general instead of a linear layer's, which is a little slower.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from sparsepeft.models.identity import is_quantized
from sparsepeft.ops.measured import fastest
from sparsepeft.spt.feed_forward import RoutedFeedForward

_ROWS, _WIDTH = 256, 768  # of the comparison: some ten milliseconds


class OneDnnLinear(nn.Linear):
    """A linear layer with the same parameters, computed by oneDNN where no gradient is wanted.

    The operator is the one that ``torch.compile`` uses; it has no backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        if (
            torch.is_grad_enabled()
            or input.dtype != self.weight.dtype
            or not can_onednn_compute(input.dtype)
            or input.device.type != "cpu"
            or is_quantized(self.weight)
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        return onednn_product(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let all plain linear layers of ``model`` compute by oneDNN; parameters stay what and where they are.

    Those of a sparse FFN are left out: it takes their weights block by block and does not call them.
    """
    routed = {part for module in model.modules() if isinstance(module, RoutedFeedForward) for part in module.modules()}
    for module in model.modules():
        if type(module) is nn.Linear and module not in routed:
            module.__class__ = OneDnnLinear


@functools.cache
def can_onednn_compute(dtype: torch.dtype) -> bool:
    """Whether :func:`onednn_product` works on this machine: bfloat16 needs instructions that not all have."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@functools.cache
def is_onednn_faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN beats PyTorch's own choice on this machine, measured once; see :func:`fastest`."""
    if not can_onednn_compute(dtype):
        return False
    sizes = ((_ROWS, _WIDTH), (4 * _WIDTH, _WIDTH), (4 * _WIDTH,))
    arguments = tuple(torch.ones(size, dtype=dtype) for size in sizes)
    forms = {
        "onednn": functools.partial(onednn_product, *arguments),
        "default": functools.partial(nn.functional.linear, *arguments),
    }
    with torch.no_grad():
        return next(iter(fastest("linear", (str(dtype), *sizes), forms))) == "onednn"


def onednn_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``nn.functional.linear`` by oneDNN, of a dtype that :func:`can_onednn_compute`; without gradients."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
