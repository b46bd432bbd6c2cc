"""Linear layers by oneDNN.

In float32 PyTorch asks MKL, which on some processors reaches half of its speed; in bfloat16 it asks oneDNN too, but for
a product in general instead of a linear layer's, which is a little slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsepeft.models.identity import is_quantized
from sparsepeft.ops.measured import fastest
from sparsepeft.ops.native import may_replace_call

_ROWS, _WIDTH = 256, 768  # of the comparison: some ten milliseconds
_FEW, _MANY = 256, 2048  # rows, of the comparisons for backward passes
_LARGE_WEIGHT = 2**16  # numbers; with fewer there is nothing to gain
_MOST_EXACT = 64  # numbers of rows that are computed as they come
_SMALL, _LARGE = 16, 64  # what others are rounded up to a multiple of: up to four times the large one, and above
_exact: set[int] = set()


class OneDnnLinear(nn.Linear):
    """A linear layer with the same parameters, computed by oneDNN where these need no gradient.

    The operator is the one that ``torch.compile`` uses; it has no backward. A frozen layer's is one more product: the
    gradient of its input is that of its output times the weight, and nothing need be remembered for it. Under
    autocast it is one for weights that autocast need not cast, see :func:`hold_frozen_linears`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        casts = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
        if (
            input.device.type != "cpu"
            or self.weight.dtype != dtype
            or not can_onednn_compute(dtype)
            or is_quantized(self.weight)
            or ((casts or torch.is_grad_enabled()) and not self._is_frozen(input))
        ):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            output: Tensor = _FrozenProduct.apply(input.to(dtype), self.weight, self.bias)
            return output
        return _product_of_any(input.to(dtype), self.weight, self.bias)

    def _is_frozen(self, input: Tensor) -> bool:
        """Whether at most the plain tensor ``input`` needs a gradient, outside of traced graphs."""
        return (
            not self.weight.requires_grad
            and (self.bias is None or not self.bias.requires_grad)
            and may_replace_call(input)
        )


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # the parameter itself
        return onednn_product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_output,), (weight,) = grad_outputs, ctx.saved_tensors
        # The operator has no backward of its own, for which gradients that are differentiated again would ask.
        product = torch.matmul if torch.is_grad_enabled() else _backward_product(grad_output, weight)
        return product(grad_output, weight), None, None


def use_onednn(model: nn.Module) -> None:
    """Let all plain linear layers of ``model`` compute by oneDNN; parameters stay what and where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
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
    """Whether oneDNN beats PyTorch's own choice on this machine, measured once; see :func:`fastest`.

    That is so of a forward pass. What a frozen layer's backward pass computes by is measured by itself, for each shape.
    """
    if not can_onednn_compute(dtype):
        return False
    forms = {"onednn": onednn_product, "default": nn.functional.linear}
    return _fastest("linear", forms, (_ROWS, _WIDTH), (4 * _WIDTH, _WIDTH), dtype) == "onednn"


def onednn_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``nn.functional.linear`` by oneDNN, of a dtype that :func:`can_onednn_compute`; without gradients."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


# A gradient (..., N) times a weight (N, K). oneDNN has to read the weight across, and may then be half as fast as MKL;
# of a copy it is the faster one.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "default": torch.matmul,
    "onednn": lambda grad, weight: onednn_product(grad, weight.t()),
    "onednn, weight copied": lambda grad, weight: onednn_product(grad, weight.t().contiguous()),
}


def _backward_product(grad: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest form for few or many rows of this width."""
    if weight.numel() < _LARGE_WEIGHT:
        return torch.matmul
    return _BACKWARD[
        _backward_form(_FEW if grad.shape[:-1].numel() < _MANY // 2 else _MANY, weight.shape, weight.dtype)
    ]


@functools.cache
def _backward_form(rows: int, shape: torch.Size, dtype: torch.dtype) -> str:
    return _fastest("linear_backward", _BACKWARD, (rows, shape[0]), shape, dtype)


def _fastest(
    name: str,
    forms: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    states: Sequence[int],
    weight: Sequence[int],
    dtype: torch.dtype,
) -> str:
    """The form of the product ``name`` that is fastest for states and a weight of these shapes."""
    tensors = [torch.ones(*shape, dtype=dtype) for shape in (states, weight)]
    calls = {form: functools.partial(product, *tensors) for form, product in forms.items()}
    return next(iter(fastest(name, (str(dtype), states[0], *weight), calls)))


def _product_of_any(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`onednn_product` in a process that goes on for long, whose inputs have any number of rows.

    oneDNN makes kernels for each number of rows that it meets, up to 3 MB and 15 ms a model's, and never frees all of
    them. After the first numbers others are rounded up by rows of zeros, which leaves the others' bits as they are.
    """
    rows = input.shape[:-1].numel()
    if len(_exact) < _MOST_EXACT:
        _exact.add(rows)
    if rows in _exact or torch.compiler.is_compiling():
        return onednn_product(input, weight, bias)
    added = -rows % (_SMALL if rows <= 4 * _LARGE else _LARGE)
    padded = nn.functional.pad(input.reshape(rows, input.shape[-1]), (0, 0, 0, added))
    return onednn_product(padded, weight, bias)[:rows].view(*input.shape[:-1], len(weight))
