"""Which parents a token keeps, and their scores: among all pairs of half-keys, or among keys of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index

# Parents with keys of their own are scored for so many tokens at a time that the scores have at most this many entries.
_SEARCH_ENTRIES = 1 << 22

Select = Callable[[Tensor, Tensor, int], Tensor]


def half_scores(x: Tensor, first_keys: Tensor, second_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of both tables of half-keys, (N, n) each, of hidden states (N, D)."""
    width = first_keys.shape[1]
    precise = softmax_dtype(x.dtype)
    return (x[:, :width] @ first_keys.T).to(precise), (x[:, width:] @ second_keys.T).to(precise)


def select_pairs(first: Tensor, second: Tensor, top_k: int) -> Tensor:
    """Return the parents i * n + j with the best sums of a first and a second score, (N, K), in no particular order.

    Source: Lample et al. (arXiv:1907.05242), section 3.1: a pair with a half that is not among the K best of its table
    has K pairs before it, those of the better halves with its other one, so the K * K pairs of both tables' best
    contain the K best of all. Differs: of equal sums the lowest index is kept.

    Args:
        first, second: (N, n), without gradients.
        top_k: at most n * n.
    """
    n = second.shape[-1]
    kept, tables = min(top_k, n), []
    for scores in (first, second):
        # Ascending, so that of the sums, too, those in front have the lower index.
        indices = top_k_lowest_index(scores, kept)[1].sort(-1).values
        tables.append((scores.gather(-1, indices), indices))
    (rows, i), (columns, j) = tables
    sums = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(1)  # (N, K * K)
    pairs = (i.unsqueeze(-1) * n + j.unsqueeze(-2)).flatten(1)
    return pairs.gather(-1, top_k_lowest_index(sums, top_k)[1])


def search_pairs(
    x: Tensor, first_keys: Tensor, second_keys: Tensor, top_k: int, select: Select = select_pairs
) -> tuple[Tensor, Tensor]:
    """Return the scores of the parents kept, with gradients, and which they are, (N, K) each.

    Args:
        select: as :func:`select_pairs`.
    """
    first, second = half_scores(x, first_keys, second_keys)
    parents = select(first.detach(), second.detach(), top_k)
    i, j = parents // len(second_keys), parents % len(second_keys)
    return first.gather(-1, i) + second.gather(-1, j), parents


def search_flat(x: Tensor, parent_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same with a key for each parent, (P, D), whose gradient is a sparse tensor: its rows are the parents kept."""
    precise = softmax_dtype(x.dtype)
    rows = max(1, _SEARCH_ENTRIES // len(parent_keys))
    with torch.no_grad():
        tiles = [top_k_lowest_index((tile @ parent_keys.T).to(precise), top_k)[1] for tile in x.split(rows)]
        parents = torch.cat(tiles)
    keys = F.embedding(parents, parent_keys, sparse=True)  # (N, K, D)
    return torch.matmul(keys, x.unsqueeze(-1)).squeeze(-1).to(precise), parents
