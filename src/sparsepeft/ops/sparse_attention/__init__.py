"""Sparse attention (SPT): keys kept by product quantization; one signature, several implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import resolve_arguments
from sparsepeft.ops.sparse_attention.dispatch import dispatch_sparse_attention
from sparsepeft.ops.sparse_attention.quantization import encode, fit_codebooks, refresh_codebooks, select
from sparsepeft.ops.sparse_attention.reference import sparse_attention_reference
from sparsepeft.ops.sparse_attention.selection import kept_tiles
from sparsepeft.ops.sparse_attention.similarity import count_matches

__all__ = ["count_matches", "encode", "fit_codebooks", "refresh_codebooks", "selection_recall", "sparse_attention"]


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    *,
    top_l: int,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    keep_self: bool = True,
    keep_first: bool = True,
    similarity: str = "inner_product",
    channel_weights: Tensor | None = None,
    granularity: str = "token",
    block_size: int = 64,
    impl: str = "auto",
) -> Tensor:
    r"""Attend to the keys that are most like the query, and to no others.

    y_i = sum_{j in S_i} softmax_{S_i}(scale * q_i . k_j) v_j

    Keys are cut into M sub-vectors, each encoded by its nearest codeword. ``similarity="inner_product"``: a key's score
    is the query's inner product with the decoded key, sum_m q_m . codebook[m, code_m], taken from a table of the
    query's products with the codewords in eight bits, see :func:`query_tables`. ``similarity="matches"``: queries are
    encoded, too, and the score is the number of equal codes. A key is valid for a query if ``key_mask`` does not hide
    it, it is no later than the query (``causal``) and within the last ``window`` positions.

    ``granularity="token"``: S_i holds the query's own position and the first valid key (``keep_self``, ``keep_first``),
    then the valid keys with the largest scores; of equal ones the nearest, of equally near the earlier; ``top_l`` in
    all. ``granularity="block"``: the same for blocks of queries and keys, ceil(top_l / block_size) key blocks for a
    query block; attention in kept blocks is exact and keeps to the valid pairs. A block's score is then what the
    queries attend to, were its keys all like their mean (no codes are needed), see :func:`pooled_scores`, or, by
    matches, the mean number of equal codes over the pairs. A ``top_l`` of the number of keys or more is dense
    attention. A query without a kept valid key gets zeros. The selection has no gradient.

    Source: arXiv:2312.10365, section on sparse multi-head attention. Differs: inner products instead of matches, ties
    go to the nearest key, always-kept keys, and block granularity; the paper keeps indices and probabilities for
    backward, here they are computed again.

    Memory is linear in the number of tokens (not in ``"reference"``). Scores and sums are float32 at least; query, key
    and value share one dtype. Autocast does not apply.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D); H is a multiple of Hkv.
        value: (B, Hkv, Tk, Dv).
        codebooks: (Hkv, M, C, W), M * W = D, C <= 16, of the keys, for matches of the queries of the group as well; see
            :func:`fit_codebooks`. None for inner products by block, which use none.
        top_l: keys kept per query, L >= 1.
        causal: whether a query sees only keys no later than itself.
        key_mask: bool, (B, Tk), True where a key may be attended; None for all.
        query_positions: int, (Tq,) or (B, Tq), index of each query among the keys; default: the last Tq of them.
        window: sliding window of causal attention: a query sees this many positions, its own included.
        scale: of the scores; default D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap).
        keep_self: always keep the query's own position (or block).
        keep_first: always keep the first valid key (or its block); with ``top_l`` 1, ``keep_self`` comes first.
        similarity: ``"inner_product"`` or ``"matches"``.
        channel_weights: (Hkv, D), positive, by which codewords are nearest to keys, those that the codebooks were
            fitted with; None weighs channels alike. For inner products alone.
        granularity: ``"token"`` or ``"block"``.
        block_size: tokens of a query block and of a key block.
        impl: ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, on a GPU ``"triton"`` for tokens and ``"flex"``
            (FlexAttention) for blocks; see :func:`sparsepeft.ops.explain`.

    Returns:
        (B, H, Tq, Dv), dtype of ``query``.

    Raises:
        TypeError: a dtype or the type of an argument is wrong.
        ValueError: shapes do not fit, a number is out of range, or ``impl`` is unknown or cannot take these tensors.
        RuntimeError: this machine does not have ``impl``.

    Example:
        >>> import torch
        >>> from sparsepeft.ops import fit_codebooks
        >>> query, key, value = torch.randn(3, 1, 4, 64, 16).unbind()  # (B, H, T, D) each
        >>> codebooks = fit_codebooks(key[0])  # of 4 heads, each with 2 sub-vectors
        >>> sparse_attention(query, key, value, codebooks, top_l=8, causal=True).shape
        torch.Size([1, 4, 64, 16])
    """
    visibility, settings = resolve_arguments(
        *(query, key, value, codebooks, channel_weights),
        top_l=top_l,
        causal=causal,
        key_mask=key_mask,
        query_positions=query_positions,
        window=window,
        scale=scale,
        softcap=softcap,
        keep_self=keep_self,
        keep_first=keep_first,
        similarity=similarity,
        granularity=granularity,
        block_size=block_size,
    )
    if impl == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return sparse_attention_reference(query, key, value, codebooks, channel_weights, visibility, settings)
    return dispatch_sparse_attention(query, key, value, codebooks, channel_weights, visibility, settings, impl)


@torch.no_grad()
def selection_recall(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor | None,
    *,
    top_l: int,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    keep_self: bool = True,
    keep_first: bool = True,
    similarity: str = "inner_product",
    channel_weights: Tensor | None = None,
    granularity: str = "token",
    block_size: int = 64,
) -> float:
    """Return the share of the true top-L keys, by exact score q . k, that the selection keeps.

    Queries with no more than ``top_l`` valid keys keep them all and say nothing: they are left out, and if all queries
    are such, the recall is 1. Arguments and errors as for :func:`sparse_attention`.
    """
    num_keys, precise = key.shape[2], softmax_dtype(query.dtype)
    visibility, settings = resolve_arguments(
        *(query, key, key, codebooks, channel_weights),
        top_l=top_l,
        causal=causal,
        key_mask=key_mask,
        query_positions=query_positions,
        window=window,
        keep_self=keep_self,
        keep_first=keep_first,
        similarity=similarity,
        granularity=granularity,
        block_size=block_size,
    )
    selection = select(query, key, codebooks, channel_weights, visibility, settings)
    num_kept = total = 0
    keys = key.to(precise).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    for rows, kept in kept_tiles(query, selection, num_keys, visibility, settings):
        valid = visibility.queries(rows.start, rows.stop).pairs(num_keys)
        scores = (query[:, :, rows].to(precise) @ keys.mT).masked_fill(~valid, -torch.inf)
        best = scores.topk(min(top_l, num_keys), dim=-1).indices
        counted = (valid.sum(-1) > top_l).expand(kept.shape[:-1])
        num_kept += int(kept.gather(-1, best)[counted].sum())
        total += int(counted.sum()) * top_l
    return num_kept / total if total else 1.0
