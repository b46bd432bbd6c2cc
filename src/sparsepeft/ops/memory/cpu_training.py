"""Compiled for CPUs, with gradients: a pass in each direction, in which tokens are multiplied with the whole memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops import native
from sparsepeft.ops.memory.cpu import library
from sparsepeft.ops.memory.pytorch import memory_read_dense

_INPUTS = ("x", "parent_keys", "child_keys", "child_values")
# Sums for the memory's gradients, for each thread: more than one, as another program may keep a thread waiting.
_PARTS = 2


class _Training(ctypes.Structure):
    """`Training` of csrc/training.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "parents", "children", "top_k", "threads")),
        *((name, ctypes.c_int64) for name in ("parts", "is_bfloat16")),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_INPUTS, "weights", "output", "grad_output")),
        *((f"grad_{name}", ctypes.c_void_p) for name in _INPUTS),
    )


def memory_read_training(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory; see :func:`memory_read`. With gradients.

    The memory is float32 on the CPU, ``x`` (N, D) is float32 or bfloat16, which is widened as it is read. For backward
    it remembers, beside its arguments, P (1 + C) numbers a token. Gradients that are to be differentiated themselves
    are those of :func:`memory_read_dense`.
    """
    output: Tensor = _Read.apply(x, parent_keys, child_keys, child_values, top_k, temperature)
    return output


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, *options: Any
    ) -> Tensor:
        inputs = (x, parent_keys, child_keys, child_values)
        columns = library().memory_columns(*child_keys.shape[:2])
        weights = parent_keys.new_empty(x.shape[0], columns)
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        _call("memory_forward", inputs, options, {"weights": weights, "output": output})
        ctx.save_for_backward(*inputs, weights)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        *inputs, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            return *_differentiable(inputs, needed, grad_output, *ctx.options), None, None
        empty = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
        grads = {
            f"grad_{name}": grad if need else None
            for name, grad, need in zip(_INPUTS, empty, (needed[0], *[any(needed[1:])] * 3), strict=True)
        }
        others = {"weights": weights, "grad_output": grad_output.contiguous()} | grads
        _call("memory_backward", inputs, ctx.options, others)
        return *(grad if need else None for grad, need in zip(grads.values(), needed, strict=True)), None, None


def _call(name: str, inputs: Sequence[Tensor], options: tuple[int, float], others: Mapping[str, Tensor | None]) -> None:
    """Call a function of csrc/training.h."""
    tensors = {**dict(zip(_INPUTS, (tensor.contiguous() for tensor in inputs), strict=True)), **others}
    num_parents, num_children, hidden = inputs[2].shape
    (top_k, temperature), threads = options, torch.get_num_threads()
    arguments = _Training(
        *(inputs[0].shape[0], hidden, num_parents, num_children, top_k, threads),
        *(_PARTS * threads, inputs[0].dtype == torch.bfloat16, temperature),
        **{each: None if tensor is None else tensor.data_ptr() for each, tensor in tensors.items()},
    )
    getattr(library(), name)(ctypes.byref(arguments), native.openmp_parallel())


def _differentiable(
    inputs: Sequence[Tensor], needed: Sequence[bool], grad_output: Tensor, top_k: int, temperature: float
) -> list[Tensor | None]:
    """Return the gradients, of those that are needed, with a graph of their own."""
    x, parent_keys, child_keys, child_values = inputs
    states = x.to(torch.float32)
    output = memory_read_dense(states, parent_keys, child_keys, child_values, top_k, temperature).to(x.dtype)
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if need else None for need in needed]
