"""The SPARTAN memory with product keys as a module."""

from __future__ import annotations

from math import isqrt

import torch
from torch import nn

from sparsepeft.layers.memory import SparseMemory
from sparsepeft.ops.load_balancing import product_load_balancing_loss
from sparsepeft.ops.product_memory import product_memory_read_unchecked
from sparsepeft.ops.product_memory.search import search_pairs


class ProductKeyMemory(SparseMemory):
    r"""A :class:`SparseMemory` of P = n * n parents, whose keys are the pairs of a first and a second half.

    Source: Lample et al. (arXiv:1907.05242), section 3.1, as in :func:`sparsepeft.ops.product_memory_read`.

    Args:
        hidden_size: width D of the states read. Of an odd one the first halves are the longer ones.
        num_parents: P, a square.
        *args, **kwargs: as of :class:`SparseMemory`.

    Raises:
        ValueError: as there; ``num_parents`` is no square, or D is 1.

    Shapes:
        first_keys (n, D - D // 2); second_keys (n, D // 2); child_keys, child_values (P, C, D). Parent i * n + j has
        the key (first_keys[i], second_keys[j]).
    """

    def _add_parent_keys(self, num_parents: int, hidden_size: int, device: torch.device | None) -> None:
        n = check_square(num_parents)
        if hidden_size < 2:
            raise ValueError(f"Product keys have two halves, but hidden_size={hidden_size} was given; use flat keys.")
        self.first_keys = nn.Parameter(torch.empty(n, hidden_size - hidden_size // 2, device=device))
        self.second_keys = nn.Parameter(torch.empty(n, hidden_size // 2, device=device))

    def _read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return product_memory_read_unchecked(
            hidden_states,
            self.first_keys,
            self.second_keys,
            self.child_keys,
            self.child_values,
            self.top_k,
            self.temperature,
            bool(self.sparse_gradients),
            self.impl,
        )

    def select(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of the parents that states (N, D) keep, and which they are, (N, K), in no order."""
        dtype = torch.promote_types(states.dtype, self.first_keys.dtype)
        return search_pairs(states.to(dtype), self.first_keys.to(dtype), self.second_keys.to(dtype), self.top_k)

    def load_balancing_loss(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """How unevenly the states choose halves; see :func:`sparsepeft.ops.product_load_balancing_loss`."""
        return product_load_balancing_loss(states, self.first_keys, self.second_keys, top_k=self.top_k, mask=mask)


def check_square(num_parents: int) -> int:
    """Return the root of the number of parents that product keys are for.

    Raises:
        ValueError: it is no square.
    """
    n = isqrt(num_parents)
    if n * n != num_parents:
        raise ValueError(
            f"num_parents={num_parents} was given with product keys, whose parents are all pairs of n half-keys and n "
            f"others; choose a square, such as {n * n} or {(n + 1) ** 2}."
        )
    return n
