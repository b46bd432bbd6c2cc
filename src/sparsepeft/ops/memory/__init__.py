"""Hierarchical sparse memory (SPARTAN): one signature, several implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsepeft.ops.memory.checks import are_valid, check_index, check_stack, raise_invalid
from sparsepeft.ops.memory.choice import OPERATOR, MemoryArguments, common_dtype, memory_read_torch, read_compiled
from sparsepeft.ops.memory.reference import memory_read_reference, read_memory_by_memory

__all__ = ["memory_read", "memory_read_mixed", "memory_read_unchecked"]


def _read_triton(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    from sparsepeft.ops.memory.triton import memory_read_triton  # Triton is optional, and slow to import

    return memory_read_triton(x, parent_keys, child_keys, child_values, top_k, temperature)


_READ: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]] = {
    "reference": memory_read_reference,
    "torch": memory_read_torch,
    "cpu": read_compiled,
    "triton": _read_triton,
}


def memory_read(
    x: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    r"""Read a hierarchical memory: keep the top-k parents, attend to their children, add the result to ``x``.

    y = x + sum_{p in S} softmax_S(x . k_p) * sum_c softmax_c(x . k_pc / temperature) v_pc

    S holds the ``top_k`` parents with the highest scores x . k_p; of equal scores the lowest index is kept. The
    selection itself has no gradient. Values of zero leave ``x`` exactly as it is.

    Source: arXiv:2211.16634, Eq. (1)-(3). Differs: ``temperature`` (the authors' code has it, the paper does not).

    Dtypes: products are taken in the common dtype of ``x`` and the memory (``torch.promote_types``), so a float32
    memory keeps its precision on bfloat16 hidden states; softmaxes in float32 at least. Autocast does not apply.

    Args:
        x: hidden states, (..., D).
        parent_keys: (P, D).
        child_keys: (P, C, D).
        child_values: (P, C, D).
        top_k: parents kept per token, 1 <= top_k <= P.
        temperature: divides the children's scores, not the parents'; positive.
        impl: ``"auto"``, ``"reference"``, ``"torch"``, on a CPU ``"cpu"``, or on a GPU ``"triton"``; see
            :func:`sparsepeft.ops.explain`.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating point, or ``top_k`` is not an int.
        ValueError: shapes do not fit, ``top_k`` or ``temperature`` is out of range, ``impl`` is unknown or cannot run
            on these tensors.
        RuntimeError: this machine does not have ``impl``.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 7, 32)  # (B, T, D)
        >>> parent_keys, child_keys, child_values = torch.randn(16, 32), torch.randn(16, 3, 32), torch.zeros(16, 3, 32)
        >>> torch.equal(memory_read(x, parent_keys, child_keys, child_values, top_k=8), x)  # as the values are zero
        True
    """
    if not are_valid(x, parent_keys, child_keys, child_values, top_k, temperature):
        raise_invalid(x, parent_keys, child_keys, child_values, top_k, temperature)
    return memory_read_unchecked(x, parent_keys, child_keys, child_values, top_k, temperature, impl)


def memory_read_unchecked(
    x: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
    impl: str = "auto",
) -> Tensor:
    """:func:`memory_read` for a module that made the memory itself: at batch size 1 the checks are felt."""
    impl = OPERATOR.choose(impl, MemoryArguments(x, parent_keys, child_keys, child_values, top_k))
    read = _READ[impl]
    tokens, dtype = x.reshape(-1, x.shape[-1]), x.dtype
    if not dtype == parent_keys.dtype == child_keys.dtype == child_values.dtype:
        dtype = common_dtype(x, parent_keys, child_keys, child_values)
        parent_keys, child_keys, child_values = (t.to(dtype) for t in (parent_keys, child_keys, child_values))
        converts = impl == "triton" or (impl == "cpu" and x.dtype == torch.bfloat16)  # as it reads
        if not converts:
            tokens = tokens.to(dtype)
    if torch.is_autocast_enabled(x.device.type):
        # Autocast would round the residual and the memory to half precision. Entering the context only where autocast
        # is on keeps exported graphs free of it.
        with torch.autocast(x.device.type, enabled=False):
            output = read(tokens, parent_keys, child_keys, child_values, top_k, temperature)
    else:
        output = read(tokens, parent_keys, child_keys, child_values, top_k, temperature)
    return output.view(x.shape).to(x.dtype)


def memory_read_mixed(
    x: Tensor,
    memory_index: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Read, in one batch, another memory in each row: row b gives what :func:`memory_read` gives with its memory.

    Source: as :func:`memory_read`. Differs: several memories of one shape are stacked, A of them.

    Args:
        x: hidden states, (B, T, D).
        memory_index: which memory a row reads, integers, (B,); -1 for none, which leaves the row as it is. May stand on
            the CPU for an ``x`` on a GPU; one that stands on the GPU is not checked by the fused form, as that would
            wait for the device: there an index out of range makes its row NaN.
        parent_keys: (A, P, D).
        child_keys: (A, P, C, D).
        child_values: (A, P, C, D).
        top_k: parents kept per token, 1 <= top_k <= P.
        temperature: divides the children's scores, not the parents'; positive.
        impl: ``"triton"`` is one launch for all rows. Every other name, ``"reference"`` too, is a loop over the
            memories that reads each with this ``impl`` of :func:`memory_read`. ``"auto"`` chooses as there.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating point, ``memory_index`` not integral, or ``top_k`` not an int.
        ValueError: as for :func:`memory_read`; stacks or index do not fit, or an index names no memory.
    """
    check_stack(x, memory_index, parent_keys, child_keys, child_values)
    if not are_valid(x, parent_keys[0], child_keys[0], child_values[0], top_k, temperature):
        raise_invalid(x, parent_keys[0], child_keys[0], child_values[0], top_k, temperature)
    fused = OPERATOR.means("triton", impl, MemoryArguments(x, parent_keys, child_keys, child_values, top_k))
    if memory_index.device.type == "cpu" or not fused:
        check_index(memory_index, len(parent_keys))
    memory_index = memory_index.to(x.device, torch.long)
    if not fused:
        read = partial(memory_read_unchecked, top_k=top_k, temperature=temperature, impl=impl)
        return read_memory_by_memory(x, memory_index, parent_keys, child_keys, child_values, read)
    from sparsepeft.ops.memory.triton import memory_read_mixed_triton

    dtype = common_dtype(x, parent_keys, child_keys, child_values)
    parent_keys, child_keys, child_values = (t.to(dtype) for t in (parent_keys, child_keys, child_values))
    return memory_read_mixed_triton(x, memory_index, parent_keys, child_keys, child_values, top_k, temperature)
