"""The parts of an FFN: linear maps, each with the low-rank updates it may carry, and the activation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """A low-rank update of a linear map (LoRA): adds ``scaling * up(down(dropout(input)))``.

    ``down`` is (r, in), ``up`` is (out, r). ``dropout`` is the probability of zeroing an entry of the update's input;
    the op draws it anew in each call, so give 0 outside of training.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0
    dropout: float = 0.0


class Projection(NamedTuple):
    """A linear map as :class:`torch.nn.Linear` holds it: ``weight`` (out, in), ``bias`` (out,) or None; and updates."""

    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[LowRank, ...] = ()

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the map."""
        yield self.weight
        if self.bias is not None:
            yield self.bias
        for low in self.lora:
            yield low.down
            yield low.up


def project(x: Tensor, projection: Projection) -> Tensor:
    """Apply the map to ``x``, (..., in), in the dtype of ``x``."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    output = F.linear(x, projection.weight.to(x.dtype), bias)
    for low in projection.lora:
        output = output + F.linear(read_low_rank(x, low), low.up.to(x.dtype))
    return output


def read_low_rank(x: Tensor, low: LowRank) -> Tensor:
    """Return ``scaling * down(dropout(x))``, (..., r)."""
    return low.scaling * F.linear(F.dropout(x, low.dropout), low.down.to(x.dtype))


def check_projection(name: str, projection: Projection, out_features: int, in_features: int) -> None:
    """Raise ValueError where a shape does not fit a map from ``in_features`` to ``out_features``."""
    shapes = {
        f"{name}.weight": (projection.weight, (out_features, in_features)),
        f"{name}.bias": (projection.bias, (out_features,)),
    }
    for index, low in enumerate(projection.lora):
        rank = low.down.shape[0] if low.down.ndim else 0
        shapes[f"{name}.lora[{index}].down"] = (low.down, (rank, in_features))
        shapes[f"{name}.lora[{index}].up"] = (low.up, (out_features, rank))
        if not 0 <= low.dropout < 1:
            raise ValueError(f"{name}.lora[{index}].dropout is {low.dropout}; expected a probability, 0 <= p < 1.")
    for part, (tensor, expected) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{part} has shape {tuple(tensor.shape)}; expected {expected}: check sizes and transposes."
            )
        if not torch.is_floating_point(tensor):
            raise TypeError(f"{part} has dtype {tensor.dtype}; expected a floating-point tensor: dequantize it first.")


# Activations, by the names that Hugging Face configurations use

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu2": _relu_squared,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def resolve_activation(activation: str | Activation) -> Activation:
    """Return the function for a name; a callable is returned as it is, ReLU in any guise as ``F.relu``.

    Raises:
        ValueError: the name is unknown.
    """
    if callable(activation):
        is_relu = activation is torch.relu or type(activation) is torch.nn.ReLU
        return F.relu if is_relu else activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}, or an elementwise function."
        )
    return ACTIVATIONS[activation]
