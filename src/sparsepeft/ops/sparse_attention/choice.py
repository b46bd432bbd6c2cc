"""Which implementation of sparse attention ``impl="auto"`` means, and which can take what."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.sparse_attention.compiled import why_not_compiled
from sparsepeft.ops.sparse_attention.native import load_library

_IMPLEMENTATIONS = ("auto", "reference", "cpu", "torch", "triton", "flex")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_SIZE = 256
_MAX_SUBVECTORS = 64  # ranks are 32 bits: 7 for matches, 24 for distances, which are up to twice the number of keys
_MAX_KEYS = 1 << 22
_FLEX_HEAD_SIZE = 16  # the least
# FlexAttention's tuned kernels have tiles of 64, those that an outer torch.compile takes of 128 (backward on an H100).
_FLEX_TILE, _FLEX_UNTUNED_TILE = 64, 128


class SparseAttentionChoice(NamedTuple):
    """An implementation of :func:`sparse_attention` and, in a sentence, why it was chosen."""

    impl: str
    reason: str


def explain_sparse_attention_impl(
    query: Tensor, value: Tensor, num_subvectors: int, *, granularity: str = "token", block_size: int = 64
) -> SparseAttentionChoice:
    """Return the implementation ``impl="auto"`` picks for these tensors, with the reason.

    Args:
        query: (B, H, Tq, D).
        value: (B, Hkv, Tk, Dv).
        num_subvectors: M.
        granularity: ``"token"`` or ``"block"``.
        block_size: of block granularity.
    """
    size = block_size if granularity == "block" else 0
    if not query.is_cuda:
        reason = why_not_compiled(query, value, num_subvectors)
        if reason is None and load_library() is None:
            reason = "the compiled kernels could not be built"
        if reason is None:
            return SparseAttentionChoice("cpu", "The compiled kernels take these tensors.")
    elif size:
        reason = _why_not_flex(query, value, size)
        if reason is None:
            return SparseAttentionChoice(
                "flex", "On CUDA, FlexAttention computes kept blocks alone; its speed has not been measured yet."
            )
    else:
        reason = _why_not_triton(query, value, num_subvectors, size)
        if reason is None:
            return SparseAttentionChoice(
                "triton",
                "On CUDA, Triton kernels select keys and attend without storing pairs; their speed has not been "
                "measured yet.",
            )
    return SparseAttentionChoice("torch", f"Plain PyTorch in linear memory is used because {reason}.")


def check_impl(impl: str) -> None:
    """Raise ``ValueError`` where ``impl`` is not the name of an implementation."""
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(_IMPLEMENTATIONS)}.")


def choose_impl(impl: str, query: Tensor, value: Tensor, num_subvectors: int, block_size: int) -> str:
    """Return the implementation to use; a ``block_size`` of 0 means token granularity.

    Raises:
        ValueError: ``impl`` names kernels that cannot take the tensors.
    """
    if impl == "auto":
        granularity = "block" if block_size else "token"
        choice = explain_sparse_attention_impl(
            query, value, num_subvectors, granularity=granularity, block_size=block_size
        )
        return choice.impl
    reason = None
    if impl == "cpu":
        reason = why_not_compiled(query, value, num_subvectors)
    elif impl == "triton":
        reason = _why_not_triton(query, value, num_subvectors, block_size)
    elif impl == "flex":
        reason = _why_not_flex(query, value, block_size)
    if reason is not None:
        raise ValueError(f"impl is {impl!r}, but {reason}: use impl='auto'.")
    return impl


def means_flex(impl: str, query: Tensor, value: Tensor, block_size: int) -> bool:
    """Return whether FlexAttention is to be used; nothing that ``torch.compile`` could not trace is asked."""
    return impl == "flex" or (
        impl == "auto" and query.is_cuda and block_size > 0 and _why_not_flex(query, value, block_size) is None
    )


def why_no_triton(tensor: Tensor) -> str | None:
    """Return why Triton kernels cannot run on this tensor, or None."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    # Triton's own switch: kernels run on the CPU, slowly.
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}, the Triton kernels run on CUDA devices"
    if tensor.dtype not in _GPU_DTYPES:
        return f"the tensors are {tensor.dtype}, the Triton kernels take float32, bfloat16 and float16"
    return None


def _why_not_triton(query: Tensor, value: Tensor, num_subvectors: int, block_size: int) -> str | None:
    reason = why_no_triton(query)
    if reason is not None:
        return reason
    if block_size:
        return "granularity is 'block', the Triton kernels keep single tokens"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_SIZE:
        return f"the head size is {max(query.shape[-1], value.shape[-1])}, the Triton kernels take {_MAX_HEAD_SIZE}"
    if num_subvectors > _MAX_SUBVECTORS:
        return f"there are {num_subvectors} sub-vectors, the Triton kernels take {_MAX_SUBVECTORS}"
    if value.shape[2] > _MAX_KEYS:
        return f"there are {value.shape[2]} keys, the Triton kernels take {_MAX_KEYS}"
    return None


def _why_not_flex(query: Tensor, value: Tensor, block_size: int) -> str | None:
    if not block_size:
        return "granularity is 'token', FlexAttention takes lists of blocks"
    if not query.is_cuda:
        return None  # eager, forward alone: its own error says so
    if not _HAS_TRITON:
        return "the package triton is not installed, which FlexAttention needs on a GPU"
    if query.dtype not in _GPU_DTYPES:
        return f"the tensors are {query.dtype}, FlexAttention takes float32, bfloat16 and float16"
    smallest, largest = (f(query.shape[-1], value.shape[-1]) for f in (min, max))
    if smallest < _FLEX_HEAD_SIZE or largest > _MAX_HEAD_SIZE:
        return f"the head sizes are {smallest} to {largest}, FlexAttention takes {_FLEX_HEAD_SIZE} to {_MAX_HEAD_SIZE}"
    tile = _FLEX_UNTUNED_TILE if torch.compiler.is_compiling() else _FLEX_TILE
    if block_size % tile:
        where = "inside torch.compile " if tile == _FLEX_UNTUNED_TILE else ""
        return f"block_size is {block_size}, FlexAttention's kernels {where}take multiples of {tile}"
    return None
