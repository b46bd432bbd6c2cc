"""Fused form for GPUs: one Triton kernel forward, one backward; each row of the batch may read a memory of its own.

Forward reads x from memory once (its second reading of a tile of a few tokens meets the cache) and writes y once. For
backward it keeps, beside x, the gate and the attention in float32, P (1 + C) numbers per token where x has D. So
backward need not read x for the gradient of x, and cannot select other parents than forward did, as scores computed
again might at a near tie. Gradients of keys and values are products of x, and of the gradient of y, with P (1 + 2 C)
coefficients per token that the kernel writes: ordinary matrix products, whose order of summation is fixed. Only where
rows of a mixed batch share a memory are their gradients added by ``index_add``, whose order on a GPU is fixed under
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsepeft.ops.memory.choice import padded_sizes
from sparsepeft.ops.memory.triton_kernels import _memory_bwd_kernel, _memory_fwd_kernel

_MAX_STRIDE = 1 << 24  # a tile has at most 32 tokens


def memory_read_triton(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read one memory; see :func:`memory_read`. The memory's tensors share one dtype, ``x`` is (N, D)."""
    parent_keys, child_keys, child_values = (t.unsqueeze(0) for t in (parent_keys, child_keys, child_values))
    output = memory_read_mixed_triton(x.unsqueeze(0), None, parent_keys, child_keys, child_values, top_k, temperature)
    return output.squeeze(0)


def memory_read_mixed_triton(
    x: Tensor,
    memory_index: Tensor | None,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
) -> Tensor:
    """Read a memory per row; see :func:`memory_read_mixed`. The memories' tensors share one dtype.

    Args:
        x: (B, T, D), float32 or narrower; products are taken in the memories' dtype.
        memory_index: (B,), or None where all rows read the only memory.
        parent_keys: (A, P, D).
        child_keys: (A, P, C, D).
        child_values: (A, P, C, D).
        top_k: parents kept per token.
        temperature: divides the children's scores.
    """
    tensors = (x, parent_keys, child_keys, child_values)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    parent_keys, child_keys, child_values = (t.contiguous() for t in tensors[1:])
    output, _, _ = _read(x, memory_index, parent_keys, child_keys, child_values, top_k, float(temperature), save)
    return output


@torch.library.custom_op("sparsepeft::memory_read_triton", mutates_args=())
def _read(
    x: Tensor,
    memory_index: Tensor | None,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, (B, T, D), the gate, (B, T, P), and the attention, (B, T, P, C); empty unless ``save``."""
    output, gate, attention = _allocate(x, child_keys, save)
    if x.numel():
        x = _readable(x)
        sizes = _block_sizes(child_keys)
        num_tiles = triton.cdiv(x.shape[1], sizes["BLOCK_T"])
        with torch.cuda.device_of(x):
            _memory_fwd_kernel[(x.shape[0] * num_tiles,)](
                *(x, memory_index, parent_keys, child_keys, child_values, output, gate, attention),
                *(x.shape[1], num_tiles, len(parent_keys), *x.stride()[:2], temperature),
                TOP_K=top_k,
                HAS_INDEX=memory_index is not None,
                SAVE=save,
                **sizes,
            )
    return output, gate, attention


@_read.register_fake
def _(
    x: Tensor, _index: Tensor | None, _parent_keys: Tensor, child_keys: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(x, child_keys, others[-1])


@torch.library.custom_op("sparsepeft::memory_read_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    memory_index: Tensor | None,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    gate: Tensor,
    attention: Tensor,
    temperature: float,
    need_x: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, (B, T, D), and of the scores, (B, T, P + P C), and the weights, (B, T, P C).

    Those not needed are empty.
    """
    grad_x, grad_scores, weights = _allocate_backward(grad_output, child_keys, need_x, need_memory)
    if grad_output.numel():
        grad_output = _readable(grad_output)
        sizes = _block_sizes(child_keys)
        num_tiles = triton.cdiv(grad_output.shape[1], sizes["BLOCK_T"])
        with torch.cuda.device_of(grad_output):
            _memory_bwd_kernel[(grad_output.shape[0] * num_tiles,)](
                *(grad_output, memory_index, parent_keys, child_keys, child_values, gate, attention),
                *(grad_x, grad_scores, weights),
                *(grad_output.shape[1], num_tiles, len(parent_keys), *grad_output.stride()[:2], temperature),
                HAS_INDEX=memory_index is not None,
                NEED_X=need_x,
                NEED_MEMORY=need_memory,
                **sizes,
            )
    return grad_x, grad_scores, weights


@_backward.register_fake
def _(
    grad_output: Tensor, _index: Tensor | None, _parent_keys: Tensor, child_keys: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_backward(grad_output, child_keys, *others[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, memory_index, parent_keys, child_keys, child_values, _, ctx.temperature, _ = inputs
    _, gate, attention = output
    ctx.save_for_backward(x, memory_index, parent_keys, child_keys, child_values, gate, attention)


def _autograd(ctx: Any, grad_output: Tensor, _gate: Tensor, _attention: Tensor) -> tuple[Tensor | None, ...]:
    x, memory_index, *memory, gate, attention = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
    grad_x, grad_scores, weights = _backward(
        grad_output, memory_index, *memory, gate, attention, ctx.temperature, needs[0], any(needs[1:])
    )
    grads: list[Tensor | None] = [grad_x, None, None, None]
    if any(needs[1:]):
        num_memories, num_parents, num_children, hidden = memory[1].shape
        keys = _sum_products(grad_scores, x, memory_index, num_memories)
        values = _sum_products(weights, grad_output, memory_index, num_memories)
        parents, children = keys.split([num_parents, num_parents * num_children], dim=1)
        grads[1:] = [parents, *(t.reshape(-1, num_parents, num_children, hidden) for t in (children, values))]
    grad_x_or_none, *grads_memory = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_x_or_none, None, *grads_memory, None, None, None


_read.register_autograd(_autograd, setup_context=_setup_context)


def _sum_products(coefficients: Tensor, vectors: Tensor, memory_index: Tensor | None, num_memories: int) -> Tensor:
    """Sum ``coefficients^T vectors`` over the tokens of each memory: (B, T, S), (B, T, D) -> (A, S, D)."""
    with torch.autocast(vectors.device.type, enabled=False):
        products = torch.bmm(coefficients.mT, vectors.to(coefficients.dtype))
    if memory_index is None:
        return products
    # Rows without a memory go to a last one that is dropped: leaving them out would need the host.
    slots = torch.where((memory_index < 0) | (memory_index >= num_memories), num_memories, memory_index)
    total = products.new_zeros((num_memories + 1, *products.shape[1:]), dtype=torch.float32)
    return total.index_add(0, slots, products.float())[:num_memories].to(products.dtype)


def _readable(x: Tensor) -> Tensor:
    """Return ``x``, (B, T, D), in strides the kernels take: D contiguous, offsets within a tile in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < _MAX_STRIDE else x.contiguous()


def _allocate(x: Tensor, child_keys: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    _, num_parents, num_children, _ = child_keys.shape
    shape = (*x.shape[:2], num_parents, num_children) if save else (0, 0, 0, 0)
    gate, attention = (x.new_empty(size, dtype=torch.float32) for size in (shape[:3], shape))
    return torch.empty_like(x, memory_format=torch.contiguous_format), gate, attention


def _allocate_backward(
    grad_output: Tensor, child_keys: Tensor, need_x: bool, need_memory: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_parents, num_children, _ = child_keys.shape
    lead = grad_output.shape[:2] if need_memory else (0, 0)
    scores, weights = num_parents * (1 + num_children), num_parents * num_children
    return (
        grad_output.new_empty(grad_output.shape if need_x else (0, 0, 0)),
        child_keys.new_empty((*lead, scores)),
        child_keys.new_empty((*lead, weights)),
    )


def _block_sizes(child_keys: Tensor) -> dict[str, int]:
    """Return the kernels' constants for a memory of this shape and dtype, and the number of warps.

    They spill no register for compute capability 8.0 and 9.0; which are fastest has not been measured.
    """
    _, num_parents, num_children, hidden = child_keys.shape
    padded_parents, padded_children = padded_sizes(num_parents, num_children)
    columns = padded_parents * padded_children
    block_d = 64 if columns <= 128 else 32
    return {
        "P": num_parents,
        "C": num_children,
        "D": hidden,
        "PADDED_P": padded_parents,
        "PADDED_C": padded_children,
        "BLOCK_T": 32 if columns <= 64 else 16,
        "BLOCK_D": block_d * 2 // child_keys.element_size(),
        "num_warps": 8,  # with 4 a few registers spill, to let more programs run at a time
    }
