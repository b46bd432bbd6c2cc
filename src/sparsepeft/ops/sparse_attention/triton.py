"""Token granularity on GPUs: Triton kernels that encode, select and attend, forward and backward.

A selection is one threshold per query, so memory is linear in the number of tokens; forward and backward work out the
kept pairs of a tile from packed codes, and compute on whole tiles. That costs no less arithmetic than dense flash
attention wherever keys kept by neighbouring queries lie scattered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sparsepeft.ops.numerics import rows_contiguous
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility, words_shape
from sparsepeft.ops.sparse_attention.similarity import weighted_words
from sparsepeft.ops.sparse_attention.triton_backward_kernels import (
    _attention_bwd_key_value_kernel,
    _attention_bwd_query_kernel,
)
from sparsepeft.ops.sparse_attention.triton_forward_kernel import _attention_fwd_kernel
from sparsepeft.ops.sparse_attention.triton_selection_kernels import (
    _encode_kernel,
    _select_kernel,
    _table_kernel,
)


class Selection(NamedTuple):
    """Tables of queries, int8, (B, H, Tq, words * 128), packed codes of keys, (B, Hkv, words, Tk), and thresholds.

    Thresholds are (B, H, 2, Tq), these and codes int32; see ``triton_selection_kernels.py``. The tables, as large as
    queries in half precision, are not kept for backward.
    """

    tables: Tensor
    key_words: Tensor
    thresholds: Tensor


def encode_triton(vectors: Tensor, codebooks: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """Return codes as :func:`encode` does, uint8, (B, H, T, M)."""
    codes = torch.empty(*vectors.shape[:3], codebooks.shape[1], dtype=torch.uint8, device=vectors.device)
    return _encode(vectors, codebooks, channel_weights, codes)


def query_tables(query: Tensor, codebooks: Tensor, settings: Settings) -> Tensor:
    """Return the tables of :func:`.similarity.query_tables`, or by matches ones for the query's codes.

    They are as ``triton_selection_kernels.py`` has them: int8, (B, H, Tq, words * 128).
    """
    words = words_shape(query.shape, codebooks.shape[1])[2]
    if not settings.inner_product:
        ones = encode_triton(query, codebooks).unsqueeze(-1) == torch.arange(16, device=query.device)
        return F.pad(ones.flatten(-2).to(torch.int8), (0, words * 128 - ones.shape[-2] * 16)) - 128
    tables = torch.empty(*query.shape[:3], words * 128, dtype=torch.int8, device=query.device)
    # Fused operations would be rounded otherwise than those of the reference.
    return _launch_on_codebooks(_table_kernel, query, codebooks, tables, WORDS=words, enable_fp_fusion=False)


def select_triton(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor,
    channel_weights: Tensor | None,
    visibility: Visibility,
    settings: Settings,
) -> Selection:
    """Make queries' tables, encode keys and find, for each query, what it keeps."""
    tables, num_subvectors = query_tables(query, codebooks, settings), codebooks.shape[1]
    words = words_shape(key.shape, num_subvectors)
    key_words = torch.empty(words, dtype=torch.int32, device=key.device)
    _encode(key, codebooks, channel_weights, key_words)
    batch, heads, num_queries, _ = query.shape
    thresholds = torch.empty(batch, heads, 2, num_queries, dtype=torch.int32, device=query.device)
    limits = selection_limits(visibility, settings, key.shape[2])
    block = 32
    num_tiles = triton.cdiv(num_queries, block)
    with torch.cuda.device_of(query):
        _select_kernel[(num_tiles * batch * heads,)](
            *(tables, key_words, limits, _as_bytes(visibility.key_mask), thresholds),
            *(*_sizes(query, key, num_tiles), settings.top_l),
            WORDS=words[2],
            DIGITS=len(f"{num_subvectors * (255 if settings.inner_product else 1):x}"),
            HAS_MASK=visibility.key_mask is not None,
            BLOCK_Q=block,
            BLOCK_K=64 if words[2] <= 2 else 32,  # no register spills
            num_warps=4,
        )
    return Selection(tables, key_words, thresholds)


def selection_limits(visibility: Visibility, settings: Settings, num_keys: int) -> Tensor:
    """Return what the kernels must know of each query: int32, (B, 6, Tq).

    These are its position (one place outside the keys at most, which leaves the order of its keys as it is), the first
    key it may attend to, the one after the last, the first valid key and its own where these are always kept, else -1,
    and the number of valid keys.
    """
    positions, lower, upper, key_mask = visibility
    own_key = torch.where((positions >= lower) & (positions < upper), positions, -1)
    if key_mask is None:
        num_valid, first = upper - lower, lower
    else:
        before = F.pad(key_mask.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))  # (B, Tk + 1)
        below = before.gather(1, lower.long())
        num_valid = before.gather(1, upper.long()) - below
        first = torch.searchsorted(before, below + 1, out_int32=True) - 1
        own_key = torch.where(key_mask.gather(1, own_key.clamp_min(0).long()), own_key, -1)
    if not settings.keep_self:
        own_key = torch.full_like(own_key, -1)
    first = torch.where(num_valid > 0, first, -1) if settings.keep_first else torch.full_like(own_key, -1)
    if settings.top_l == 1:
        first = torch.where(own_key >= 0, -1, first)
    return torch.stack([positions.clamp(-1, num_keys), lower, upper, first, own_key, num_valid], dim=1).to(torch.int32)


def triton_forward(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the output, (B, H, Tq, Dv), and the log-sum-exp of the scores, float32, (B, H, Tq)."""
    query, key, value = (rows_contiguous(tensor) for tensor in (query, key, value))
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tile = _tile("forward", query, value)
    num_tiles = triton.cdiv(query.shape[2], tile["BLOCK_Q"])
    with torch.cuda.device_of(query):
        _attention_fwd_kernel[(num_tiles * query.shape[0] * query.shape[1],)](
            *(query, key, value, output, log_sum_exp),
            *_selected(selection, visibility, settings, key),
            *_sizes(query, key, num_tiles),
            *(stride for tensor in (query, key, value) for stride in tensor.stride()[:3]),
            *(settings.scale, settings.softcap),
            **_constants(query, value, selection, visibility, settings),
            **tile,
        )
    return output, log_sum_exp


def triton_backward(
    grad_output: Tensor, attended: Attended, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    query, key, value, output, log_sum_exp = attended
    grad_output, query, key, value = (rows_contiguous(tensor) for tensor in (grad_output, query, key, value))
    grad_query, grad_key, grad_value = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    )
    delta = torch.empty_like(log_sum_exp)
    tile = {kernel: _tile(kernel, query, value) for kernel in ("query", "key_value")}
    query_tiles = triton.cdiv(query.shape[2], tile["query"]["BLOCK_Q"])
    key_tiles = triton.cdiv(key.shape[2], tile["key_value"]["BLOCK_K"])
    selected = _selected(selection, visibility, settings, key)
    strides = [stride for tensor in (grad_output, query, key, value) for stride in tensor.stride()[:3]]
    numbers = (*strides, settings.scale, settings.softcap)
    constants = _constants(query, value, selection, visibility, settings)
    with torch.cuda.device_of(query):
        _attention_bwd_query_kernel[(query_tiles * query.shape[0] * query.shape[1],)](
            *(grad_output, query, key, value, output, log_sum_exp, delta, grad_query),
            *selected,
            *_sizes(query, key, query_tiles),
            *numbers,
            **constants,
            **tile["query"],
        )
        _attention_bwd_key_value_kernel[(key_tiles * key.shape[0] * key.shape[1],)](
            *(grad_output, query, key, value, log_sum_exp, delta, grad_key, grad_value),
            *selected,
            *_sizes(query, key, key_tiles),
            *numbers,
            **constants,
            **tile["key_value"],
        )
    return grad_query, grad_key, grad_value


def _encode(vectors: Tensor, codebooks: Tensor, channel_weights: Tensor | None, codes: Tensor) -> Tensor:
    """Write ``codes``: int32 are packed, uint8 are not."""
    words, half_norms = weighted_words(codebooks.to(torch.float32), channel_weights)
    return _launch_on_codebooks(
        *(_encode_kernel, vectors, words, half_norms.contiguous(), codes),
        PADDED_W=triton.next_power_of_2(codebooks.shape[-1]),
        PACKED=codes.dtype == torch.int32,
    )


def _launch_on_codebooks(kernel: Any, vectors: Tensor, codebooks: Tensor, *tensors: Tensor, **constants: Any) -> Tensor:
    """Launch a kernel that makes the last of the tensors of each vector with the codebooks of its head."""
    vectors = rows_contiguous(vectors)
    batch, heads, num_tokens, _ = vectors.shape
    kv_heads, num_subvectors, num_codewords, width = codebooks.shape
    block = 128
    num_tiles = triton.cdiv(num_tokens, block)
    with torch.cuda.device_of(vectors):
        kernel[(num_tiles * batch * heads,)](
            *(vectors, codebooks.to(torch.float32).contiguous(), *tensors),
            *(num_tokens, heads, heads // kv_heads, num_tiles, *vectors.stride()[:3]),
            M=num_subvectors,
            C=num_codewords,
            W=width,
            BLOCK_T=block,
            num_warps=4,
            **constants,
        )
    return tensors[-1]


def _selected(selection: Selection, visibility: Visibility, settings: Settings, key: Tensor) -> tuple[Any, ...]:
    return *selection, selection_limits(visibility, settings, key.shape[2]), _as_bytes(visibility.key_mask)


def _sizes(query: Tensor, key: Tensor, num_tiles: int) -> tuple[int, ...]:
    return query.shape[2], key.shape[2], query.shape[1], query.shape[1] // key.shape[1], num_tiles


def _constants(
    query: Tensor, value: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> dict[str, Any]:
    size, value_size = query.shape[-1], value.shape[-1]
    return {
        "D": size,
        "DV": value_size,
        "PADDED_D": _padded(size),
        "PADDED_DV": _padded(value_size),
        "WORDS": selection.key_words.shape[2],
        "HAS_MASK": visibility.key_mask is not None,
        "KEEP_SELF": settings.keep_self,
        "SOFTCAP": settings.softcap > 0,
    }


def _tile(kernel: str, query: Tensor, value: Tensor) -> dict[str, int]:
    """Return the sizes of a tile, the number of warps and of stages of a kernel.

    With these no register spills for compute capability 8.0 and 9.0 at head sizes of 64 and, in half precision, 80 and
    128. Which are fastest has not been measured.
    """
    size = max(_padded(query.shape[-1]), _padded(value.shape[-1]))
    if query.element_size() > 2:
        numbers = (16 if kernel == "key_value" else 32, 32, 8, 2)
    elif size <= 64:
        numbers = {"forward": (64, 64, 4, 3), "query": (64, 64, 4, 2), "key_value": (32, 64, 4, 2)}[kernel]
    elif size <= 128:
        numbers = (64, 32, 8, 2)
    else:
        numbers = (32, 32, 8, 2)
    return dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"), numbers, strict=True))


def _padded(size: int) -> int:
    """Return the power of two that holds a head size, 16 at least: what a matrix unit takes."""
    return max(16, triton.next_power_of_2(size))


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
