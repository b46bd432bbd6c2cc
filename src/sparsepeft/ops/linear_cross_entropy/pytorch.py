"""Cross entropy of a linear head in plain PyTorch: tokens in chunks, gradients taken while a chunk's logits are there.

PyTorch has a ``linear_cross_entropy`` with a chunked form since 2.13. It is not used here: it has no softcap and no
scale, computes what ignored tokens add as well, and the versions before lack it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsepeft.ops.numerics import softmax_dtype

# Logits in a chunk: 128 MiB in float32, of which two lie in memory at a time (with a softcap three). Fewer tokens at a
# time make the products slower: the whole weight is read for each chunk.
_CHUNK = 2**25


def linear_cross_entropy_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """The summed loss of tokens (N, D) with labels (N,), see :func:`linear_cross_entropy`."""
    total: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, ignore_index, torch.is_grad_enabled()
    )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        needs_gradients: bool,
    ) -> Tensor:
        dtype = softmax_dtype(hidden.dtype)
        needs = [needs_gradients and needed for needed in ctx.needs_input_grad[:3]]
        counted = labels.ne(ignore_index).nonzero().squeeze(-1)
        grad_hidden = hidden.new_empty(len(counted), hidden.shape[1]) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs[2] else None
        total, start = hidden.new_zeros((), dtype=dtype), 0
        for chunk in counted.split(max(1, _CHUNK // max(1, len(weight)))):
            tokens = hidden[chunk]
            loss, grad = _loss_of(tokens, weight, bias, labels[chunk], scale, softcap, any(needs))
            total += loss
            if grad_hidden is not None:
                grad_hidden[start : start + len(chunk)] = grad.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += grad.t().to(weight.dtype) @ tokens
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            start += len(chunk)
            del grad  # before the next chunk's logits
        ctx.save_for_backward(counted, grad_hidden, grad_weight, grad_bias)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        counted, *taken = ctx.saved_tensors
        if not len(counted):  # of a mean, the gradient is infinite then
            gradient = torch.zeros_like(gradient)
        grads = [None if one is None else (one * gradient).to(ctx.dtype) for one in taken]
        if grads[0] is not None:
            grads[0] = grads[0].new_zeros(ctx.shape).index_copy_(0, counted, grads[0])
        return (*grads, None, None, None, None, None)


def _loss_of(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, and its gradient by W h + b, (n, V); without need of it something else."""
    logits = F.linear(tokens, weight, bias).to(softmax_dtype(tokens.dtype))
    if scale != 1:
        logits *= scale
    slope = None
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if needs_gradient else None  # of the softcap
        logits *= softcap
    log_probabilities = logits.log_softmax(-1)
    del logits
    loss = -log_probabilities.gather(1, labels[:, None]).sum()
    if not needs_gradient:
        return loss, log_probabilities
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, labels[:, None], grad.new_full((len(labels), 1), -1))
    if slope is not None:
        grad *= slope
    return loss, grad if scale == 1 else grad.mul_(scale)
