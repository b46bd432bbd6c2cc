"""Which implementation of sparse attention ``impl="auto"`` means."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparsepeft.ops.sparse_attention.compiled import why_not_compiled
from sparsepeft.ops.sparse_attention.native import load_library

_IMPLEMENTATIONS = ("auto", "reference", "cpu", "torch")


class SparseAttentionChoice(NamedTuple):
    """An implementation of :func:`sparse_attention` and, in a sentence, why it was chosen."""

    impl: str
    reason: str


def explain_sparse_attention_impl(query: Tensor, value: Tensor, num_subvectors: int) -> SparseAttentionChoice:
    """Return the implementation ``impl="auto"`` picks for these tensors, with the reason.

    Args:
        query: (B, H, Tq, D).
        value: (B, Hkv, Tk, Dv).
        num_subvectors: M.
    """
    reason = why_not_compiled(query, value, num_subvectors)
    if reason is None and load_library() is None:
        reason = "the compiled kernels could not be built"
    if reason is None:
        return SparseAttentionChoice("cpu", "The compiled kernels take these tensors.")
    return SparseAttentionChoice("torch", f"Plain PyTorch in linear memory is used because {reason}.")


def check_impl(impl: str) -> None:
    """Raise ``ValueError`` where ``impl`` is not the name of an implementation."""
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(_IMPLEMENTATIONS)}.")


def choose_impl(impl: str, query: Tensor, value: Tensor, num_subvectors: int) -> str:
    """Return the implementation to use.

    Raises:
        ValueError: ``impl`` names the compiled kernels and these cannot take the tensors.
    """
    if impl == "auto":
        return explain_sparse_attention_impl(query, value, num_subvectors).impl
    if impl == "cpu":
        reason = why_not_compiled(query, value, num_subvectors)
        if reason is not None:
            raise ValueError(f"impl is 'cpu', but {reason}: use impl='auto'.")
    return impl
