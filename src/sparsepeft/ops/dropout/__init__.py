"""Dropout in training on a CPU, in one pass over the numbers.

In PyTorch it takes a good part of a step there: random numbers are drawn for a mask of floating-point numbers, which is
divided, multiplied with and remembered. Here nothing is remembered: backward draws the same numbers again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsepeft.ops.dropout.cpu import attention, dropout, why_not_built
from sparsepeft.ops.measured import fastest
from sparsepeft.ops.native import has_plain_memory, may_replace_call
from sparsepeft.ops.registry import DISABLED

__all__ = ["CompiledDropout", "is_compiled_dropout_faster"]

_MEASURED = 1 << 19  # numbers: a few milliseconds a call
_PROBABILITY = 0.1  # that it is measured with; times do not depend on it


class CompiledDropout(TorchFunctionMode):
    """While this lasts, in this thread, dropout is computed by the compiled kernels, wherever they can.

    That is ``torch.nn.functional.dropout`` (so ``torch.nn.Dropout`` too) and the dropout inside of
    ``scaled_dot_product_attention``, of plain float32 and bfloat16 tensors on a CPU, outside of traced graphs. What is
    dropped follows from ``torch.manual_seed`` and not from the number of threads, but is not what PyTorch would drop.
    It is of no use where activations are checkpointed: PyTorch leaves it before backward, which would recompute them
    with its own dropout.

    Example:
        >>> layer, x = torch.nn.Dropout(0.1), torch.randn(3, 5, requires_grad=True)
        >>> with CompiledDropout():
        ...     loss = layer(x).sum()
        >>> loss.backward()
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        compute = _COMPILED.get(func)
        output = None if compute is None else compute(*args, **kwargs)
        return func(*args, **kwargs) if output is None else output


@functools.cache
def is_compiled_dropout_faster() -> bool:
    """Whether the kernels can be built and beat PyTorch's dropout on this machine, measured once."""
    if "cpu" in DISABLED or why_not_built() is not None:
        return False
    x = torch.ones(_MEASURED, requires_grad=True)

    def train(form: Callable[..., Tensor]) -> None:
        output = form(x, _PROBABILITY)
        output.backward(output.detach())

    state = torch.get_rng_state()
    with torch.enable_grad():
        times = fastest("dropout", (_MEASURED,), {"cpu": lambda: train(dropout), "torch": lambda: train(F.dropout)})
    torch.set_rng_state(state)
    return next(iter(times)) == "cpu"


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return dropout(input, p) if training and not inplace and 0 < p < 1 and _are_plain(input) else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if (
        not 0 < dropout_p < 1
        or query.ndim != 4
        or not query.shape[:2] == key.shape[:2] == value.shape[:2]
        or not query.dtype == key.dtype == value.dtype
        or not _are_plain(query, key, value)
    ):
        return None
    if attn_mask is not None:
        if attn_mask.requires_grad or is_causal or not has_plain_memory(attn_mask):
            return None
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.float()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention(query, key, value, attn_mask, dropout_p, scale, is_causal)


_COMPILED: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
}


def _are_plain(*tensors: Tensor) -> bool:
    return may_replace_call(*tensors) and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
