"""Exact top-K over parents; of equal scores the lowest index wins."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which softmaxes are taken: float32 for half precision, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def top_k_lowest_index(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` best values and their indices per row, best first, (N, K) each.

    ``torch.topk`` does not promise which of several equal scores it returns; a stable sort does.
    """
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[:, :top_k], indices[:, :top_k]
