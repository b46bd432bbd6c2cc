"""Which parents a token keeps, and their scores: among all pairs of half-keys, or among keys of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, first_keys, second_keys)):
        return _search_with_gradients(x, first_keys, second_keys, top_k, select)
    return _search(x, first_keys, second_keys, top_k, select)


def _search(x: Tensor, first_keys: Tensor, second_keys: Tensor, top_k: int, select: Select) -> tuple[Tensor, Tensor]:
    first, second = half_scores(x, first_keys, second_keys)
    parents = select(first, second, top_k)
    i, j = parents // len(second_keys), parents % len(second_keys)
    return first.gather(-1, i) + second.gather(-1, j), parents


@torch.compiler.disable  # as what reads the children is
def _search_with_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    scores, parents = _Search.apply(*arguments)
    return scores, parents


class _Search(torch.autograd.Function):
    """The search, whose gradients cost what the kept pairs do: of x no product with all half-keys."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first_keys: Tensor, second_keys: Tensor, top_k: int, select: Select
    ) -> tuple[Tensor, Tensor]:
        scores, parents = _search(x, first_keys, second_keys, top_k, select)
        ctx.save_for_backward(x, first_keys, second_keys, parents)
        ctx.mark_non_differentiable(parents)
        return scores, parents

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first_keys, second_keys, parents = ctx.saved_tensors
        n, width = len(second_keys), first_keys.shape[1]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        grad_keys = []
        halves = ((first_keys, parents // n, slice(width)), (second_keys, parents % n, slice(width, None)))
        for keys, half, columns in halves:
            if grad_x is not None:
                weights = grads[0].to(keys.dtype)
                grad_x[:, columns] = F.embedding_bag(half, keys, mode="sum", per_sample_weights=weights)
            of_scores = grads[0].new_zeros(len(x), n).scatter_add_(1, half, grads[0])  # two parents may share a half
            grad_keys.append(of_scores.to(x.dtype).T @ x[:, columns])
        needed = [grad if need else None for grad, need in zip(grad_keys, ctx.needs_input_grad[1:3], strict=True)]
        return grad_x, *needed, None, None


def search_flat(x: Tensor, parent_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same with a key for each parent, (P, D), whose gradient is a sparse tensor: its rows are the parents kept."""
    precise = softmax_dtype(x.dtype)
    rows = max(1, _SEARCH_ENTRIES // len(parent_keys))
    with torch.no_grad():
        tiles = [top_k_lowest_index((tile @ parent_keys.T).to(precise), top_k)[1] for tile in x.split(rows)]
        parents = torch.cat(tiles)
    keys = F.embedding(parents, parent_keys, sparse=True)  # (N, K, D)
    return torch.matmul(keys, x.unsqueeze(-1)).squeeze(-1).to(precise), parents
