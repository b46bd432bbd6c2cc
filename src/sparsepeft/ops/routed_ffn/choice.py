"""Which implementation of the routed FFN ``impl="auto"`` means."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from sparsepeft.ops.routed_ffn.arguments import MakeProducts
from sparsepeft.ops.routed_ffn.products import GroupedProducts, LoopedProducts, row_multiple

IMPLEMENTATIONS = ("reference", "looped", "grouped_mm", "triton")


class RoutedFFNChoice(NamedTuple):
    """An implementation of :func:`routed_ffn` and, in a sentence, why it was chosen."""

    impl: str
    reason: str


def products_of(impl: str) -> MakeProducts:
    """Return what makes the products of an implementation other than the reference; imports Triton where needed.

    Raises:
        ImportError: Triton is not installed.
    """
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ImportError("impl='triton' needs Triton: pip install triton, or use impl='grouped_mm' or 'looped'.")
        from sparsepeft.ops.routed_ffn.triton import TritonProducts

        return TritonProducts
    return GroupedProducts if impl == "grouped_mm" else LoopedProducts


def explain_routed_ffn_impl(
    device_type: str, dtype: torch.dtype, block_size: int, *, exporting: bool = False
) -> RoutedFFNChoice:
    """Return the implementation ``impl="auto"`` picks, with the reason.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: of the products, see :func:`routed_ffn`.
        block_size: neurons in a block, I / G.
        exporting: whether ``torch.export`` is tracing.
    """
    if exporting:
        return RoutedFFNChoice("reference", "An exported graph cannot have products whose sizes depend on data.")
    if device_type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return RoutedFFNChoice("looped", f"On {device_type} in {dtype} there is no kernel for grouped products.")
    if importlib.util.find_spec("triton") is not None:
        return RoutedFFNChoice("triton", "On CUDA, Triton gathers and scatters within the products.")
    if dtype == torch.bfloat16 and block_size % row_multiple(dtype) == 0:
        return RoutedFFNChoice("grouped_mm", "Triton is missing; torch has grouped products in bfloat16 on CUDA.")
    return RoutedFFNChoice("looped", f"Triton is missing; grouped_mm takes no blocks of {block_size} in {dtype}.")
