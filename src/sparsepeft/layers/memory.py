"""The SPARTAN memory as a module."""

from __future__ import annotations

import torch
from torch import nn

from sparsepeft.ops.load_balancing import load_balancing_loss
from sparsepeft.ops.memory import memory_read_unchecked
from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index
from sparsepeft.ops.product_memory import memory_read_sparsely


class SparseMemory(nn.Module):
    r"""A two-level memory read by every position: ``y = x + sum_{p in topK} g_p V_p^T softmax(K_p x / temperature)``.

    Source: arXiv:2211.16634, equations 1-3. Differs: child values may start at zero, so that a fresh memory
    changes nothing (DESIGN: the default).

    Args:
        hidden_size: width D of the states read.
        num_parents: P, the cells of the first level.
        num_children: C, the cells under each parent.
        top_k: parents kept per position, 1 <= top_k <= P.
        temperature: divides the child logits.
        initializer_range: standard deviation of parent and child keys.
        value_initializer_range: standard deviation of child values; 0 makes the fresh memory an identity.
        impl: which implementation of :func:`sparsepeft.ops.memory_read` runs.

    Attributes:
        sparse_gradients: whether the gradients of keys and values are sparse tensors, which hold the rows of the
            parents that were read. None, where nobody has decided: they are not. An optimizer has to take them, see
            :class:`sparsepeft.training.LazyAdamW`.

    Raises:
        ValueError: a size or the temperature is out of range; in forward, states of another width.

    Shapes:
        parent_keys (P, D); child_keys, child_values (P, C, D); forward (..., D) -> (..., D).
    """

    def __init__(
        self,
        hidden_size: int,
        num_parents: int = 16,
        num_children: int = 3,
        top_k: int = 8,
        *,
        temperature: float = 1.0,
        initializer_range: float = 0.02,
        value_initializer_range: float = 0.0,
        impl: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_parents or num_children < 1 or temperature <= 0:
            raise ValueError(
                f"num_parents={num_parents}, num_children={num_children}, top_k={top_k}, temperature={temperature} "
                "were given; a memory needs at least one child per parent, 1 <= top_k <= num_parents and a positive "
                "temperature."
            )
        self.top_k, self.temperature, self.impl = top_k, temperature, impl
        self.initializer_range, self.value_initializer_range = initializer_range, value_initializer_range
        self.sparse_gradients: bool | None = None
        self._add_parent_keys(num_parents, hidden_size, device)
        self.child_keys = nn.Parameter(torch.empty(num_parents, num_children, hidden_size, device=device))
        self.child_values = nn.Parameter(torch.empty(num_parents, num_children, hidden_size, device=device))
        self.reset_parameters()

    def _add_parent_keys(self, num_parents: int, hidden_size: int, device: torch.device | None) -> None:
        self.parent_keys = nn.Parameter(torch.empty(num_parents, hidden_size, device=device))

    @property
    def num_parents(self) -> int:
        """P."""
        return len(self.child_keys)

    def reset_parameters(self) -> None:
        """Keys ~ N(0, initializer_range), values ~ N(0, value_initializer_range) or exactly zero."""
        for name, parameter in self.named_parameters():
            if name != "child_values":
                nn.init.normal_(parameter, std=self.initializer_range)
        if self.value_initializer_range:
            nn.init.normal_(self.child_values, std=self.value_initializer_range)
        else:
            nn.init.zeros_(self.child_values)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Read the memory at every position of ``hidden_states`` (..., D) and add what was read."""
        if hidden_states.shape[-1] != self.child_keys.shape[-1]:
            raise ValueError(
                f"The states have shape {tuple(hidden_states.shape)}, but this memory was made for width "
                f"{self.child_keys.shape[-1]}; pass states whose last dimension is that."
            )
        return self._read(hidden_states)

    def _read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        keys, child_keys, child_values = self.parent_keys, self.child_keys, self.child_values
        read = memory_read_sparsely if self.sparse_gradients and torch.is_grad_enabled() else memory_read_unchecked
        return read(hidden_states, keys, child_keys, child_values, self.top_k, self.temperature, self.impl)

    def select(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of the parents that states (N, D) keep, and which they are, (N, K), in no order."""
        dtype = torch.promote_types(states.dtype, self.parent_keys.dtype)
        scores = states.to(dtype) @ self.parent_keys.to(dtype).T
        return top_k_lowest_index(scores.to(softmax_dtype(dtype)), self.top_k)

    def load_balancing_loss(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """How unevenly the states, (B, T, D), choose parents; see :func:`sparsepeft.ops.load_balancing_loss`."""
        return load_balancing_loss(states, self.parent_keys, top_k=self.top_k, mask=mask)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        num_parents, num_children, hidden_size = self.child_keys.shape
        return f"hidden_size={hidden_size}, num_parents={num_parents}, num_children={num_children}, top_k={self.top_k}"
