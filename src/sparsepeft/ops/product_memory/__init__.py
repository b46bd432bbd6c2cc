"""Large memories: parents found by product keys, gradients of the cells that were read alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.memory.checks import are_valid, raise_invalid
from sparsepeft.ops.memory.choice import common_dtype
from sparsepeft.ops.native import has_plain_memory, is_proven, may_replace_call
from sparsepeft.ops.product_memory.children import GATHERED, Read, read_children
from sparsepeft.ops.product_memory.cpu import COMPILED, select_pairs_cpu, update_rows_cpu, why_not_built
from sparsepeft.ops.product_memory.reference import product_memory_read_reference
from sparsepeft.ops.product_memory.search import search_flat, search_pairs, select_pairs
from sparsepeft.ops.product_memory.update import AdamStep, Rows, update_rows
from sparsepeft.ops.registry import DISABLED, Implementation, Operator

__all__ = ["memory_read_sparsely", "product_memory_read", "product_memory_read_unchecked", "step_of_rows"]


class ProductArguments(NamedTuple):
    """What the choice depends on: hidden states, and all tensors of the memory."""

    x: Tensor
    memory: tuple[Tensor, ...]

    @classmethod
    def bind(
        cls, x: Tensor, first_keys: Tensor, second_keys: Tensor, child_keys: Tensor, child_values: Tensor, **_: Any
    ) -> ProductArguments:
        """Take the arguments of :func:`product_memory_read`."""
        return cls(x, (first_keys, second_keys, child_keys, child_values))


def product_memory_read(
    x: Tensor,
    first_keys: Tensor,
    second_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    sparse_gradients: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Read a memory of P = n * n parents, whose keys are all pairs of a first and a second half.

    y = x + sum_{p in S} softmax_S(x . k_p) * sum_c softmax_c(x . k_pc / temperature) v_pc,  k_{i n + j} = (a_i, b_j)

    A parent's score is the sum of its halves' scores, so the ``top_k`` best of all P parents are found, exactly, among
    the pairs of each table's ``top_k`` best: 2 n products with half a vector instead of P with a whole one. The gate
    needs the kept scores alone, since a softmax over all P that is renormalised over the kept ones is the softmax over
    the kept ones. Of equal scores the lowest parent is kept.

    Source: Lample et al. (arXiv:1907.05242), section 3.1, for SPARTAN's parents (arXiv:2211.16634, Eq. 1-3). Differs:
    one head, no query network and no normalisation of queries; a parent has children instead of one value.

    Dtypes: as for :func:`sparsepeft.ops.memory_read`.

    Args:
        x: hidden states, (..., D).
        first_keys: a, (n, D1).
        second_keys: b, (n, D2), with D1 + D2 = D.
        child_keys: (P, C, D).
        child_values: (P, C, D).
        top_k: parents kept per token, 1 <= top_k <= P.
        temperature: divides the children's scores, not the parents'; positive.
        sparse_gradients: the gradients of ``child_keys`` and ``child_values`` are sparse tensors, coalesced, with a row
            for each parent that was read.
        impl: ``"auto"``, ``"reference"``, ``"torch"``, or for float32 on a CPU ``"cpu"``; see
            :func:`sparsepeft.ops.explain`. The reference has no sparse gradients.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating point, or ``top_k`` is not an int.
        ValueError: shapes do not fit, ``top_k`` or ``temperature`` is out of range, ``impl`` is unknown or cannot run
            on these tensors.
        RuntimeError: this machine does not have ``impl``.

    Example:
        >>> import torch
        >>> x, first_keys, second_keys = torch.randn(2, 7, 32), torch.randn(8, 16), torch.randn(8, 16)
        >>> child_keys, child_values = torch.randn(64, 3, 32), torch.zeros(64, 3, 32)
        >>> y = product_memory_read(x, first_keys, second_keys, child_keys, child_values, top_k=8)
        >>> torch.equal(y, x)  # as the values are zero
        True
    """
    halves = (first_keys, second_keys)
    if any(keys.ndim != 2 for keys in halves) or len(first_keys) != len(second_keys):
        raise ValueError(
            f"first_keys has shape {tuple(first_keys.shape)}, second_keys {tuple(second_keys.shape)}; expected (n, D1) "
            "and (n, D2), a table for each half of the parents' keys."
        )
    for name, keys in zip(("first_keys", "second_keys"), halves, strict=True):
        if not keys.is_floating_point():
            raise TypeError(f"{name} has dtype {keys.dtype}; expected a floating-point tensor: convert it first.")
    if first_keys.device != second_keys.device:
        raise ValueError(
            f"first_keys is on {first_keys.device}, second_keys on {second_keys.device}: move them to one."
        )
    parent_keys = first_keys.new_empty(()).expand(len(first_keys) ** 2, first_keys.shape[1] + second_keys.shape[1])
    if not are_valid(x, parent_keys, child_keys, child_values, top_k, temperature):
        raise_invalid(x, parent_keys, child_keys, child_values, top_k, temperature)
    if impl == "reference" and sparse_gradients:
        raise ValueError("impl is 'reference', which has no sparse gradients: use impl='auto', or leave them out.")
    return product_memory_read_unchecked(
        x, first_keys, second_keys, child_keys, child_values, top_k, temperature, sparse_gradients, impl
    )


def product_memory_read_unchecked(
    x: Tensor,
    first_keys: Tensor,
    second_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
    sparse_gradients: bool = False,
    impl: str = "auto",
) -> Tensor:
    """:func:`product_memory_read` for a module that made the memory itself."""

    def read(impl: str, tokens: Tensor, first: Tensor, second: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if impl == "reference":
            return product_memory_read_reference(tokens, first, second, keys, values, top_k, temperature)
        scores, parents = search_pairs(
            tokens, first, second, top_k, select_pairs_cpu if impl == "cpu" else select_pairs
        )
        return _read(impl, tokens, scores, parents, keys, values, temperature, sparse_gradients)

    return _in_common_dtype(read, impl, x, (first_keys, second_keys, child_keys, child_values), sparse_gradients)


def memory_read_sparsely(
    x: Tensor,
    parent_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
    impl: str = "auto",
) -> Tensor:
    """:func:`sparsepeft.ops.memory_read` with sparse gradients: of all three tables, with rows for parents read."""

    def read(impl: str, tokens: Tensor, parent_keys: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores, parents = search_flat(tokens, parent_keys, top_k)
        return _read(impl, tokens, scores, parents, keys, values, temperature, sparse=True)

    return _in_common_dtype(read, impl, x, (parent_keys, child_keys, child_values), sparse=True)


def step_of_rows(rows: Rows, step: AdamStep) -> None:
    """Update rows of a table by AdamW, by the compiled kernel where it can; see :func:`update_rows`."""
    plain = has_plain_memory(*rows) and all(tensor.is_contiguous() for tensor in rows[3:])
    if (
        plain
        and all(tensor.dtype == torch.float32 for tensor in rows[2:])
        and is_proven()
        and "cpu" not in DISABLED
        and why_not_built() is None
    ):
        update_rows_cpu(rows, step)
    else:
        update_rows(rows, step)


def _read(
    impl: str,
    x: Tensor,
    scores: Tensor,
    parents: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float,
    sparse: bool,
) -> Tensor:
    read = Read(x, torch.softmax(scores, dim=-1), parents, keys, values, temperature)
    return read_children(read, COMPILED if impl == "cpu" else GATHERED, sparse)


def _in_common_dtype(
    read: Callable[..., Tensor], impl: str, x: Tensor, memory: tuple[Tensor, ...], sparse: bool
) -> Tensor:
    """``read`` with the implementation that ``impl`` means, on tokens (N, D) and a memory of one dtype."""
    impl = OPERATOR.choose(impl, ProductArguments(x, memory))
    dtype = common_dtype(x, *memory)
    if sparse and torch.is_grad_enabled() and any(t.requires_grad and t.dtype != dtype for t in memory):
        raise ValueError(
            f"sparse gradients were asked for with a memory of {memory[-1].dtype} and states of {x.dtype}, but products"
            f" are taken in {dtype}, from which they cannot be converted back: give the memory that dtype."
        )
    # Autocast would round the residual and the memory; entered only where it is on, exported graphs are free of it.
    is_on = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if is_on else nullcontext():
        output = read(impl, x.reshape(-1, x.shape[-1]).to(dtype), *(tensor.to(dtype) for tensor in memory))
    return output.view(x.shape).to(x.dtype)


def _why_not_cpu(arguments: ProductArguments) -> str | None:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return "a traced graph has no compiled kernels"
    tensors = (arguments.x, *arguments.memory)
    if not may_replace_call(*tensors):
        return "the compiled kernels read plain tensors on a CPU"
    if common_dtype(*tensors) != torch.float32:
        return "the compiled kernels compute in float32"
    return None


def _why_not_cpu_by_itself(_: ProductArguments) -> str | None:
    return None if is_proven() else "nobody has run the compiled kernels on a processor like this one yet"


OPERATOR = Operator(
    "product_memory_read",
    ProductArguments.bind,
    [
        Implementation("reference", 0, "the definition"),
        Implementation("torch", 10, "plain PyTorch, on every device and in every dtype"),
        Implementation(
            "cpu",
            20,
            "the compiled kernels fetch each row once, ahead of its use",
            why_unavailable=why_not_built,
            why_not=_why_not_cpu,
            why_not_automatic=_why_not_cpu_by_itself,
        ),
    ],
)
