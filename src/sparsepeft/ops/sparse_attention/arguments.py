"""What an implementation gets beside the tensors, which keys a query sees and how keys are kept; and bad arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CODEWORDS = 16


class Settings(NamedTuple):
    """The settings of one call; see :func:`sparse_attention`. A ``block_size`` of 0 means token granularity."""

    inner_product: bool  # the similarity; else matches
    top_l: int
    scale: float
    softcap: float
    keep_self: bool
    keep_first: bool
    block_size: int

    def pack(self) -> list[float]:
        """Return the settings as numbers, as an operator of torch takes them."""
        return [float(number) for number in self]

    @classmethod
    def unpack(cls, numbers: Sequence[float], num_keys: int) -> Settings:
        """Return what was packed, with no more keys to keep than there are."""
        inner_product, top_l, scale, softcap, keep_self, keep_first, block_size = numbers
        top_l, always = min(int(top_l), num_keys), (bool(keep_self), bool(keep_first))
        return cls(bool(inner_product), top_l, scale, softcap, *always, int(block_size))


class Attended(NamedTuple):
    """What forward took and gave, as backward needs it: the log-sum-exp is that of the scores, (B, H, Tq)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    log_sum_exp: Tensor


class Visibility(NamedTuple):
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
        causal: bool = False,
        window: int | None = None,
        query_positions: Tensor | None = None,
        key_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Visibility:
        """Work out the limits from the arguments of :func:`sparse_attention`."""
        if query_positions is None:
            query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
        positions = query_positions.to(device=device, dtype=torch.int32).expand(batch, num_queries).contiguous()
        upper = (positions + 1).clamp(0, num_keys) if causal else torch.full_like(positions, num_keys)
        lower = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(0, num_keys)
        return cls(positions, lower, upper, None if key_mask is None else key_mask.to(device).contiguous())

    def queries(self, begin: int, end: int) -> Visibility:
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


def resolve_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    channel_weights: Tensor | None,
    *,
    top_l: int,
    causal: bool,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    window: int | None,
    keep_self: bool,
    keep_first: bool,
    similarity: str,
    granularity: str,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Visibility, Settings]:
    """Return what the arguments of :func:`sparse_attention` say, or raise what it documents."""
    if granularity not in ("token", "block"):
        raise ValueError(f"granularity is {granularity!r}; expected 'token' or 'block'.")
    if similarity not in ("inner_product", "matches"):
        raise ValueError(f"similarity is {similarity!r}; expected 'inner_product' or 'matches'.")
    _check_tensors(query, key, value)
    tensors = {"query": query, "key": key, "value": value}
    if codebooks is not None:
        check_codebooks(codebooks, query.shape[-1])
        check_channel_weights(channel_weights, codebooks)
        if codebooks.shape[0] != key.shape[1]:
            raise ValueError(
                f"codebooks is for {codebooks.shape[0]} heads, key has {key.shape[1]}: give one per key-value head."
            )
        tensors["codebooks"] = codebooks
    elif similarity == "matches" or granularity == "token":
        raise ValueError(
            "codebooks is None; expected (Hkv, M, C, W), by which keys are chosen: fit_codebooks makes them. Inner "
            "products by block alone go without."
        )
    if channel_weights is not None and similarity == "matches":
        raise ValueError("channel_weights is given, but similarity is 'matches', which has none: leave it out.")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        listed = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors are on different devices ({listed}): move them to one.")
    _check_count("top_l", top_l)
    _check_count("block_size", block_size)
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask has dtype {key_mask.dtype}; expected bool, True where a key may be attended.")
        if key_mask.shape != (batch, num_keys):
            raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; expected (B, Tk), ({batch}, {num_keys}).")
    if query_positions is not None:
        if query_positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"query_positions has dtype {query_positions.dtype}; expected int64 or int32.")
        if query_positions.shape not in ((num_queries,), (batch, num_queries)):
            raise ValueError(
                f"query_positions has shape {tuple(query_positions.shape)}; expected ({num_queries},) or "
                f"({batch}, {num_queries}), the index of each query among the keys."
            )
    if window is not None:
        _check_count("window", window)
        if not causal:
            raise ValueError("window is given without causal=True; a window looks back only: set causal=True.")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}; expected a positive finite number, or None.")
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    settings = Settings(
        *(similarity == "inner_product", top_l, scale, float(softcap or 0.0), bool(keep_self), bool(keep_first)),
        block_size=block_size if granularity == "block" else 0,
    )
    visibility = Visibility.of(
        *(batch, num_queries, num_keys),
        causal=causal,
        window=window,
        query_positions=query_positions,
        key_mask=key_mask,
        device=query.device,
    )
    return visibility, settings


def check_codebooks(codebooks: Tensor, head_size: int) -> None:
    """Raise unless the codebooks suit vectors of this size."""
    if not codebooks.is_floating_point():
        raise TypeError(f"codebooks has dtype {codebooks.dtype}; expected a floating-point tensor.")
    if codebooks.ndim != 4 or 0 in codebooks.shape:
        raise ValueError(
            f"codebooks has shape {tuple(codebooks.shape)}; expected (Hkv, M, C, W): M sub-vectors of width W with C "
            "codewords for each key-value head; fit_codebooks makes them."
        )
    _, num_subvectors, num_codewords, width = codebooks.shape
    if num_codewords > MAX_CODEWORDS:
        raise ValueError(f"codebooks has {num_codewords} codewords; expected at most {MAX_CODEWORDS}.")
    if num_subvectors * width != head_size:
        raise ValueError(
            f"codebooks has {num_subvectors} sub-vectors of width {width}, {num_subvectors * width} numbers, but the "
            f"vectors have {head_size}: choose a width that divides the head size."
        )


def check_channel_weights(channel_weights: Tensor | None, codebooks: Tensor) -> None:
    """Raise unless the weights, if any, suit the codebooks."""
    if channel_weights is None:
        return
    kv_heads, num_subvectors, _, width = codebooks.shape
    if not channel_weights.is_floating_point() or channel_weights.shape != (kv_heads, num_subvectors * width):
        raise ValueError(
            f"channel_weights has shape {tuple(channel_weights.shape)} and {channel_weights.dtype}; expected "
            f"floating-point (Hkv, D), ({kv_heads}, {num_subvectors * width})."
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor: convert it first.")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (B, H, T, D), none of them 0.")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}; expected one for all."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}; expected the same batch, heads and tokens."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}; expected (B, H, Tq, D) and (B, Hkv, Tk, D) "
            "with H a multiple of Hkv."
        )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an int of at least 1.")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1.")
