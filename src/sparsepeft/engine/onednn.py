"""Linear layers by oneDNN: in float32 PyTorch asks MKL, which on some processors reaches half of its speed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

_ROWS, _WIDTH, _REPEATS = 64, 768, 7  # of the comparison: a few milliseconds


class OneDnnLinear(nn.Linear):
    """A linear layer with the same parameters, computed by oneDNN where no gradient is wanted.

    The operator is the one that ``torch.compile`` uses; it has no backward, and other dtypes go to oneDNN anyway.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        if (
            torch.is_grad_enabled()
            or not input.dtype == self.weight.dtype == torch.float32
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        return onednn_product(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let all plain linear layers of ``model`` compute by oneDNN; parameters stay what and where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


@functools.cache
def is_onednn_faster() -> bool:
    """Whether oneDNN beats PyTorch's own choice on this machine, by a comparison of a few milliseconds."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    given, weight, bias = torch.ones(_ROWS, _WIDTH), torch.ones(4 * _WIDTH, _WIDTH), torch.ones(4 * _WIDTH)
    forms: tuple[Callable[..., Tensor], ...] = (onednn_product, nn.functional.linear)
    with torch.no_grad():
        times: list[list[float]] = [[], []]
        for _ in range(_REPEATS):
            for form, taken in zip(forms, times, strict=True):
                start = time.perf_counter()
                form(given, weight, bias)
                taken.append(time.perf_counter() - start)
    onednn, own = map(statistics.median, times)
    return onednn < own


def onednn_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``nn.functional.linear`` of float32 tensors by oneDNN; without gradients."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product
