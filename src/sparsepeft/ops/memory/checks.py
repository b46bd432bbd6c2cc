"""What the memory's arguments must be, and the errors that say so."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def are_valid(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> bool:
    """Whether the arguments are valid: one expression, as checking each separately is felt at batch size 1."""
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
        and x.device == parent_keys.device == child_keys.device == child_values.device
        and type(top_k) is int
        and 1 <= top_k <= shape[0]
        and 0 < temperature < math.inf  # not isfinite: it breaks a compiled graph
    )


def raise_invalid(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> None:
    """Raise the error that says which argument does not fit, and what to do."""
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
    if len({tensor.device for tensor in named.values()}) > 1:
        listed = ", ".join(f"{name} on {tensor.device}" for name, tensor in named.items())
        raise ValueError(f"tensors are on different devices ({listed}): move them to one.")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k is {top_k!r}; expected an int between 1 and {parent_keys.shape[0]}.")
    if not 1 <= top_k <= parent_keys.shape[0]:
        raise ValueError(
            f"top_k is {top_k}, but the memory has {parent_keys.shape[0]} parents: choose 1 <= top_k <= P."
        )
    raise ValueError(f"temperature is {temperature}; expected a positive finite number (1.0 is neutral).")


def check_stack(x: Tensor, memory_index: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor) -> None:
    """Raise where the stacked memories, or the index of each row, do not fit; of one memory see the above."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, T, D), one row per item of memory_index.")
    integral = not memory_index.is_floating_point() and not memory_index.is_complex()
    if not integral or memory_index.dtype == torch.bool:
        raise TypeError(f"memory_index has dtype {memory_index.dtype}; expected integers, one per row of x.")
    if memory_index.shape != x.shape[:1]:
        raise ValueError(
            f"memory_index has shape {tuple(memory_index.shape)}, x {tuple(x.shape)}: give one index per row of x."
        )
    expected = {"parent_keys": (parent_keys, "P, D"), "child_keys": (child_keys, "P, C, D")}
    for name, (tensor, rest) in {**expected, "child_values": (child_values, "P, C, D")}.items():
        if tensor.ndim != rest.count(",") + 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (A, {rest}), A memories stacked.")
        if len(tensor) != len(parent_keys) or len(tensor) < 1:
            raise ValueError(
                f"{name} stacks {len(tensor)} memories, parent_keys {len(parent_keys)}: give both the same number, "
                "at least 1."
            )


def check_index(memory_index: Tensor, num_memories: int) -> None:
    """Raise where an index names no memory. On a GPU this waits for the device."""
    outside = memory_index[(memory_index < -1) | (memory_index >= num_memories)]
    if len(outside):
        raise ValueError(
            f"memory_index holds {outside[0].item()}, but {num_memories} memories are stacked: use 0 to "
            f"{num_memories - 1}, or -1 for a row without a memory."
        )
