"""Bad arguments, each with one clear sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsepeft.ops.sparse_attention.codes import check_codebooks


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor,
    top_l: int,
    causal: bool,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    *,
    granularity: str,
    block_size: int,
) -> None:
    """Raise what :func:`sparse_attention` documents."""
    if granularity not in ("token", "block"):
        raise ValueError(f"granularity is {granularity!r}; expected 'token' or 'block'.")
    _check_tensors(query, key, value)
    check_codebooks(codebooks, query.shape[-1])
    if codebooks.shape[0] != key.shape[1]:
        raise ValueError(
            f"codebooks is for {codebooks.shape[0]} heads, key has {key.shape[1]}: give one per key-value head."
        )
    tensors = {"query": query, "key": key, "value": value, "codebooks": codebooks}
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
