"""Activation functions by the names that Hugging Face configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
