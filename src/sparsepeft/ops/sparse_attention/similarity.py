"""How much a query and a key are alike, from the key's codes: a whole number, the larger the better.

By inner products: sum_m T[m, code[m]], where the query's table T holds its products with the codewords, in eight bits.
By matches: the number of codes that query and key share, as in SPT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype

_LARGEST_ENTRY = 255


class Codes(NamedTuple):
    """What queries choose single keys by: the codes of the keys and those of the queries, uint8, and the codebooks.

    ``keys`` is (B, Hkv, Tk, M), ``queries`` (B, H, Tq, M), or None for inner products, ``codebooks`` (Hkv, M, C, W).
    """

    keys: Tensor
    queries: Tensor | None
    codebooks: Tensor

    def scores(self, query: Tensor, rows: slice) -> Tensor:
        """Return the similarity of some of the queries, of (B, H, Tq, D), and all keys: int32, (B, H, rows, Tk)."""
        if self.queries is not None:
            return count_matches(self.queries[:, :, rows], self.keys)
        return sum_entries(query_tables(query[:, :, rows], self.codebooks), self.keys)


def weighted_words(codebooks: Tensor, channel_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return words z and halved norms n such that the nearest codeword of a vector x is the one of least n - x . z.

    Nearest by sum_d w_d^2 (x_d - c_d)^2, which is a constant less 2 sum_d w_d^2 x_d c_d plus sum_d w_d^2 c_d^2.

    Args:
        codebooks: (Hkv, M, C, W).
        channel_weights: w, (Hkv, M * W); 1 if None.

    Returns:
        (Hkv, M, C, W) and (Hkv, M, C), dtype of ``codebooks``.
    """
    words = codebooks
    if channel_weights is not None:
        squares = channel_weights.to(codebooks.dtype).square()
        words = codebooks * squares.unflatten(-1, (codebooks.shape[1], 1, -1))
    return words, (words * codebooks).sum(-1) / 2


def count_matches(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Return the number of equal codes of every query and key, 0 to M.

    Args:
        query_codes: (B, H, Tq, M), from :func:`encode`.
        key_codes: (B, Hkv, Tk, M); H is a multiple of Hkv.

    Returns:
        int32, (B, H, Tq, Tk).
    """
    batch, heads, num_queries, num_subvectors = query_codes.shape
    _, kv_heads, num_keys, _ = key_codes.shape
    grouped = query_codes.unflatten(1, (kv_heads, heads // kv_heads))
    matches = torch.zeros(
        batch, kv_heads, heads // kv_heads, num_queries, num_keys, dtype=torch.int32, device=query_codes.device
    )
    for m in range(num_subvectors):
        matches += grouped[..., m].unsqueeze(-1) == key_codes[..., m][:, :, None, None]
    return matches.flatten(1, 2)


def query_tables(query: Tensor, codebooks: Tensor) -> Tensor:
    """Return each query's inner products with the codewords, in eight bits.

    With t[m, c] = q_m . codebook[m, c] and u[m, c] = t[m, c] - min_c t[m, c], the table is
    T[m, c] = round(u[m, c] * (255 / max_{m, c} u)), halves to even, and zero where that maximum is zero. What each
    sub-vector lacks is the same for all keys, and the scale the same for all entries: neither changes which keys are
    best. Every implementation takes these steps in this order, in float32 at least, so that all agree to the bit where
    the products are exact.

    Source: asymmetric distance computation, Jégou et al., doi:10.1109/TPAMI.2010.57; entries in eight bits, André et
    al., arXiv:1812.09162. Differs: inner products, and one scale for all sub-vectors of a query.

    Args:
        query: (B, H, Tq, D).
        codebooks: (Hkv, M, C, W) with M * W = D; H is a multiple of Hkv.

    Returns:
        uint8, (B, H, Tq, M, C).
    """
    precise = softmax_dtype(query.dtype)
    kv_heads, num_subvectors, _, width = codebooks.shape
    grouped = query.to(precise).unflatten(1, (kv_heads, -1)).unflatten(-1, (num_subvectors, width))
    products = torch.einsum("bkgtmw,kmcw->bkgtmc", grouped, codebooks.to(precise))
    above = products - products.amin(-1, keepdim=True)
    largest = above.amax((-2, -1), keepdim=True)
    # Not 255 / largest, which PyTorch takes for 255 times the rounded reciprocal.
    scale = torch.where(largest > 0, torch.full_like(largest, _LARGEST_ENTRY) / largest, 0)
    return torch.round(above * scale).to(torch.uint8).flatten(1, 2)


def sum_entries(tables: Tensor, key_codes: Tensor) -> Tensor:
    """Return the sum over sub-vectors of the entries that each key's codes name, 0 to 255 M.

    Args:
        tables: (B, H, Tq, M, C), from :func:`query_tables`.
        key_codes: (B, Hkv, Tk, M), from :func:`encode`.

    Returns:
        int32, (B, H, Tq, Tk).
    """
    # A product with zeros and ones: whole numbers below 2^24, exact in float32.
    named = key_codes.unsqueeze(-1) == torch.arange(tables.shape[-1], device=tables.device)
    grouped = tables.float().flatten(-2).unflatten(1, (key_codes.shape[1], -1))  # (B, Hkv, G, Tq, M * C)
    return (grouped @ named.float().flatten(-2).mT.unsqueeze(2)).to(torch.int32).flatten(1, 2)
