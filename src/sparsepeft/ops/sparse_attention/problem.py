"""What every implementation is given beside the tensors: which pairs may meet, and how keys are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rules(NamedTuple):
    """The settings of one call; see :func:`sparse_attention`. A ``block_size`` of 0 means token granularity."""

    top_l: int
    scale: float
    softcap: float
    keep_self: bool
    keep_first: bool
    block_size: int


class Reach(NamedTuple):
    """The keys each query may attend to: those from ``lower`` to before ``upper`` that ``key_mask`` does not hide.

    ``positions`` (index of the query among the keys, possibly outside of them), ``lower`` and ``upper`` are int32,
    (B, Tq); ``key_mask`` is bool, (B, Tk), or None.
    """

    positions: Tensor
    lower: Tensor
    upper: Tensor
    key_mask: Tensor | None

    @classmethod
    def of(
        cls,
        batch: int,
        num_queries: int,
        num_keys: int,
        *,
        causal: bool,
        window: int | None,
        query_positions: Tensor | None,
        key_mask: Tensor | None,
        device: torch.device,
    ) -> Reach:
        """Work out the limits from the arguments of :func:`sparse_attention`."""
        if query_positions is None:
            query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
        positions = query_positions.to(device=device, dtype=torch.int32).expand(batch, num_queries).contiguous()
        upper = (positions + 1).clamp(0, num_keys) if causal else torch.full_like(positions, num_keys)
        lower = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(0, num_keys)
        return cls(positions, lower, upper, None if key_mask is None else key_mask.to(device).contiguous())

    def queries(self, begin: int, end: int) -> Reach:
        """Return the limits of some of the queries."""
        return self._replace(
            positions=self.positions[:, begin:end], lower=self.lower[:, begin:end], upper=self.upper[:, begin:end]
        )

    def pairs(self, num_keys: int) -> Tensor:
        """Return which pairs may meet, bool, (B, 1, Tq, Tk)."""
        index = torch.arange(num_keys, device=self.lower.device)
        allowed = (index >= self.lower.unsqueeze(-1)) & (index < self.upper.unsqueeze(-1))
        if self.key_mask is not None:
            allowed = allowed & self.key_mask.unsqueeze(1)
        return allowed.unsqueeze(1)


def words_shape(shape: torch.Size, num_subvectors: int) -> tuple[int, int, int, int]:
    """Return the shape of the packed codes of vectors (B, H, T, D): eight codes to an int32, (B, H, words, T)."""
    return shape[0], shape[1], -(-num_subvectors // 8), shape[2]
