"""What the operators share: the dtype of softmaxes, and an exact top-K that settles ties."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many columns a stable sort of each row is cheaper than torch.topk and a check for ties (CPU).
_SORT_MAX_COLUMNS = 32


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which softmaxes are taken: float32 for half precision, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def top_k_lowest_index(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` best scores of each row and their indices, (N, K) each, in no particular order.

    ``torch.topk`` does not promise which of several equal scores it returns, so ties at the K-th place are settled
    here. NaN counts as the largest score.
    """
    num_columns = scores.shape[-1]
    if top_k == num_columns:
        return scores, torch.arange(num_columns, device=scores.device).expand_as(scores)
    # Runtimes that take exported graphs know top-k better than a stable sort.
    if num_columns <= _SORT_MAX_COLUMNS and not torch.compiler.is_exporting():
        values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values[:, :top_k], indices[:, :top_k]

    # The selected set is ambiguous only in rows whose K-th and (K+1)-th scores are equal.
    values, indices = torch.topk(scores, top_k + 1, dim=-1)
    last, values, indices = values[:, top_k - 1 :], values[:, :top_k], indices[:, :top_k]
    if torch.compiler.is_compiling() or scores.is_cuda:
        indices = _settle_ties(scores, last[:, :1], top_k)  # every row: looking for tied ones would need the host
        return scores.gather(-1, indices), indices
    tied = (last[:, 0] == last[:, 1]).nonzero()[:, 0]
    if len(tied):
        indices[tied] = _settle_ties(scores[tied], last[tied, :1], top_k)
        values = scores.gather(-1, indices)
    return values, indices


def _settle_ties(scores: Tensor, threshold: Tensor, top_k: int) -> Tensor:
    """Return the indices of the ``top_k`` best of each row, given its K-th best score, (N, 1)."""
    scores, threshold = scores.detach(), threshold.detach()
    # A key that ranks scores above the threshold by their distance to it, and scores at the threshold by index.
    position = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    key = torch.where(scores < threshold, -torch.inf, torch.where(scores == threshold, -position, scores - threshold))
    return torch.topk(key, top_k, dim=-1).indices
