"""A memory with product keys, as defined: every parent's key is written out. The others are tested against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.memory.reference import memory_read_reference


def product_memory_read_reference(
    x: Tensor,
    first_keys: Tensor,
    second_keys: Tensor,
    child_keys: Tensor,
    child_values: Tensor,
    top_k: int,
    temperature: float,
) -> Tensor:
    """Read the memory as a flat one with P = n * n parents; see :func:`product_memory_read`.

    All tensors share one dtype; ``x`` is (N, D). It scores all P parents: clear, and slow.
    """
    n = len(first_keys)
    # Parent i * n + j has the key (a_i, b_j).
    parent_keys = torch.cat([first_keys.repeat_interleave(n, 0), second_keys.repeat(n, 1)], dim=-1)  # (P, D)
    return memory_read_reference(x, parent_keys, child_keys, child_values, top_k, temperature)
