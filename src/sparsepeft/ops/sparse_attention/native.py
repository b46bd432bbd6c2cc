"""The compiled kernels of sparse attention."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

from sparsepeft.ops import native

SOURCES = Path(__file__).parent / "csrc"


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the kernels, built if need be, or None (after one warning that says why) where they cannot be had."""
    try:
        return native.load_library(SOURCES)
    except native.BuildError as error:
        warnings.warn(
            f"sparse attention's compiled kernels are not available ({error}) Plain PyTorch is used instead: the same "
            "results in linear memory, but slower than dense attention. Install a C++ compiler (g++ or clang++, or "
            "name one in $CXX) for speed.",
            stacklevel=2,
        )
        return None
