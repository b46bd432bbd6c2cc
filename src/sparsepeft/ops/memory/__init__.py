"""Hierarchical sparse memory (SPARTAN): one signature, several implementations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsepeft.ops.memory.choice import MemoryChoice, choose_memory_impl, explain_memory_impl
from sparsepeft.ops.memory.masked import memory_read_masked
from sparsepeft.ops.memory.reference import memory_read_reference
from sparsepeft.ops.memory.selected import memory_read_selected

__all__ = ["MemoryChoice", "explain_memory_impl", "memory_read", "memory_read_unchecked"]

_Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "reference": memory_read_reference,
    "masked": memory_read_masked,
    "selected": memory_read_selected,
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
        impl: ``"auto"``, ``"reference"``, ``"masked"`` or ``"selected"``; see :func:`explain_memory_impl`.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating point, or ``top_k`` is not an int.
        ValueError: shapes do not fit, ``top_k`` or ``temperature`` is out of range, or ``impl`` is unknown.
    """
    if not _fits(x, parent_keys, child_keys, child_values, top_k, temperature):
        _raise_misfit(x, parent_keys, child_keys, child_values, top_k, temperature)
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
    num_parents, num_children, hidden = child_keys.shape
    if impl == "auto":
        impl = choose_memory_impl(num_parents, num_children, top_k, exporting=torch.compiler.is_exporting())
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(['auto', *_IMPLEMENTATIONS])}.")
    read = _IMPLEMENTATIONS[impl]
    tokens, dtype = x.reshape(-1, hidden), x.dtype
    if not dtype == parent_keys.dtype == child_keys.dtype == child_values.dtype:
        for parameter in (parent_keys, child_keys, child_values):
            dtype = torch.promote_types(dtype, parameter.dtype)
        tokens, parent_keys = tokens.to(dtype), parent_keys.to(dtype)
        child_keys, child_values = child_keys.to(dtype), child_values.to(dtype)
    if torch.is_autocast_enabled(x.device.type):
        # Autocast would round the residual and the memory to half precision. Entering the context only where autocast
        # is on keeps exported graphs free of it.
        with torch.autocast(x.device.type, enabled=False):
            output = read(tokens, parent_keys, child_keys, child_values, top_k, temperature)
    else:
        output = read(tokens, parent_keys, child_keys, child_values, top_k, temperature)
    return output.view(x.shape).to(x.dtype)


def _fits(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> bool:
    """Whether the arguments are sound. Said in one go: at batch size 1 a check of its own for each would be felt."""
    shape = child_keys.shape
    return (
        len(shape) == 3
        and child_values.shape == shape
        and parent_keys.shape == (shape[0], shape[2])
        and x.ndim >= 1
        and x.shape[-1] == shape[2]
        and shape[1] >= 1
        and shape[2] >= 1
        and all(tensor.is_floating_point() for tensor in (x, parent_keys, child_keys, child_values))
        and type(top_k) is int
        and 1 <= top_k <= shape[0]
        and 0 < temperature < math.inf  # not isfinite: it breaks a compiled graph
    )


def _raise_misfit(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> None:
    named = {"x": x, "parent_keys": parent_keys, "child_keys": child_keys, "child_values": child_values}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor: convert it first.")
    if x.ndim < 1:
        raise ValueError("x is a scalar; expected hidden states of shape (..., D).")
    if parent_keys.ndim != 2:
        raise ValueError(f"parent_keys has shape {tuple(parent_keys.shape)}; expected (P, D), one key per parent.")
    for name, tensor in (("child_keys", child_keys), ("child_values", child_values)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (P, C, D), C children per parent.")
        if tensor.shape[0] != parent_keys.shape[0]:
            raise ValueError(
                f"{name} is for {tensor.shape[0]} parents, parent_keys for {parent_keys.shape[0]}: "
                "give both the same first dimension P."
            )
    if child_keys.shape[1] != child_values.shape[1]:
        raise ValueError(
            f"child_keys has {child_keys.shape[1]} children per parent, child_values {child_values.shape[1]}: "
            "give both the same second dimension C."
        )
    sizes = {name: tensor.shape[-1] for name, tensor in named.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"last dimensions differ ({listed}): expected one hidden size D for all.")
    if child_keys.shape[1] < 1 or child_keys.shape[2] < 1:
        raise ValueError(f"child_keys has shape {tuple(child_keys.shape)}; expected at least one child and D >= 1.")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k is {top_k!r}; expected an int between 1 and {parent_keys.shape[0]}.")
    if not 1 <= top_k <= parent_keys.shape[0]:
        raise ValueError(
            f"top_k is {top_k}, but the memory has {parent_keys.shape[0]} parents: choose 1 <= top_k <= P."
        )
    raise ValueError(f"temperature is {temperature}; expected a positive finite number (1.0 is neutral).")
