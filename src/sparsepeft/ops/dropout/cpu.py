"""Compiled for CPUs: one pass, forward and backward, on torch's threads. See ``csrc/kernel.cpp``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops import native

_SOURCES = Path(__file__).parent / "csrc"


class _Dropout(ctypes.Structure):
    """`Dropout` of csrc/kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "threads", "is_bfloat16")),
        ("seed", ctypes.c_uint64),
        ("probability", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("source", "target")),
    )


class _Attention(ctypes.Structure):
    """`Attention` of csrc/kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "threads", "is_bfloat16")),
        *((name, ctypes.c_int64) for name in ("is_causal", "mask_kind", "mask_batch", "mask_head", "mask_query")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("probability", "scale")),
        *((name, ctypes.c_void_p) for name in ("weights", "dropped", "grad_dropped", "mask")),
    )


@functools.cache
def why_not_built() -> str | None:
    """Return why this machine has no compiled kernels, or None; builds them (a few seconds) at the first call."""
    return native.why_not_built(_library)


def dropout(x: Tensor, probability: float) -> Tensor:
    """As ``torch.nn.functional.dropout`` in training, of float32 or bfloat16 and other random numbers.

    They follow from torch's generator, of which a call takes one number, and from where an element stands.
    """
    output: Tensor = _Drop.apply(x, probability, _draw_seed())
    return output


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probability: float,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """As ``scaled_dot_product_attention`` with dropout; random numbers as for :func:`dropout`.

    Products are taken in the dtype of ``query``, softmaxes in float32. Backward remembers, beside the arguments, the
    weights after the softmax.

    Args:
        query: (B, H, Q, D), float32 or bfloat16 as the others.
        key: (B, H, K, D).
        value: (B, H, K, E).
        mask: boolean, or float32 and added to the scores; it broadcasts to (B, H, Q, K) and has no gradient.
        probability: of dropping a weight.
        scale: of the scores.
        is_causal: a query sees no later key.

    Returns:
        (B, H, Q, E).
    """
    output: Tensor = _Attend.apply(query, key, value, mask, probability, scale, is_causal, _draw_seed())
    return output


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, seed: int) -> Tensor:
        ctx.arguments = probability, seed
        return _drop(x, probability, seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _Drop.apply(grad_outputs[0], *ctx.arguments), None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        weights = torch.matmul(query, key.mT)
        dropped = torch.empty_like(weights)
        _call("attention_forward", weights, dropped, None, mask, *arguments)
        ctx.save_for_backward(query, key, value, mask, weights)
        ctx.arguments = arguments
        return torch.matmul(dropped, value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        query, key, value, mask, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            inputs = [tensor for tensor in (query, key, value) if tensor.requires_grad]
            output = _plain(query, key, value, mask, *ctx.arguments)
            found = iter(torch.autograd.grad(output, inputs, grad_output, create_graph=True))
            return *(next(found) if tensor.requires_grad else None for tensor in (query, key, value)), *[None] * 5
        grad_weights = torch.matmul(grad_output, value.mT)
        dropped = torch.empty_like(weights)
        _call("attention_backward", weights, dropped, grad_weights, None, *ctx.arguments)
        grads = torch.matmul(grad_weights, key), torch.matmul(grad_weights.mT, query)
        return *grads, torch.matmul(dropped.mT, grad_output), *[None] * 5


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probability: float,
    scale: float,
    is_causal: bool,
    seed: int,
) -> Tensor:
    """The same by operations that PyTorch can differentiate."""
    scores = torch.matmul(query, key.mT).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0).to(value.dtype)
    return torch.matmul(_Drop.apply(weights, probability, seed), value)


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.long).random_().item())


def _drop(x: Tensor, probability: float, seed: int) -> Tensor:
    x = x.contiguous()
    output = torch.empty_like(x)
    arguments = _Dropout(
        *(x.numel(), torch.get_num_threads(), x.dtype == torch.bfloat16, seed, probability),
        *(x.data_ptr(), output.data_ptr()),
    )
    _library().dropout(ctypes.byref(arguments), native.openmp_parallel())
    return output


def _call(
    name: str,
    weights: Tensor,
    dropped: Tensor,
    grad_dropped: Tensor | None,
    mask: Tensor | None,
    probability: float,
    scale: float,
    is_causal: bool,
    seed: int,
) -> None:
    """Call a function of csrc/kernel.cpp, which changes ``weights``, or ``grad_dropped``, and writes ``dropped``."""
    strides: tuple[int, ...] = (0, 0, 0)
    kind = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.shape[-1] == weights.shape[-1] else mask.expand(*mask.shape[:-1], weights.shape[-1])
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(weights.shape)
        strides = mask.stride()[:3]
    arguments = _Attention(
        *weights.shape,
        *(torch.get_num_threads(), weights.dtype == torch.bfloat16, is_causal, kind, *strides),
        *(seed, probability, scale, weights.data_ptr(), dropped.data_ptr()),
        *(None if tensor is None else tensor.data_ptr() for tensor in (grad_dropped, mask)),
    )
    getattr(_library(), name)(ctypes.byref(arguments), native.openmp_parallel())


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = native.load_library(_SOURCES)
    for function in (loaded.dropout, loaded.attention_forward, loaded.attention_backward):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    return loaded
