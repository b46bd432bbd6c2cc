"""Compiled for CPUs, without gradients: one pass over the tokens that touches only children of kept parents.

With gradients it is ``cpu_training.py``, from the same library.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from sparsepeft.ops import native

_SOURCES = Path(__file__).parent / "csrc"
# From so many scores on a matrix product gives those of the parents sooner than products with one token at a time.
_MANY_SCORES = 1 << 14
# Up to so many parents for each that is kept, a few tokens are read at once: products with what only one of them keeps
# cost less than loading keys and values for each token anew.
_SHARED = 2


class _Memory(ctypes.Structure):
    """`Memory` of csrc/kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "parents", "children", "top_k", "threads")),
        *((name, ctypes.c_int64) for name in ("is_bfloat16", "is_shared")),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "parent_keys", "child_keys", "child_values")),
        *((name, ctypes.c_void_p) for name in ("parent_scores", "output")),
    )


@functools.cache
def why_not_built() -> str | None:
    """Return why this machine has no compiled kernel, or None; builds it (a few seconds) at the first call."""
    return native.why_not_built(library)


def memory_read_cpu(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory; see :func:`memory_read`. No gradients.

    The memory is float32 on the CPU, ``x`` (N, D) is float32 or bfloat16, which is widened as it is read.
    """
    num_parents, num_children, hidden = child_keys.shape
    x, parent_keys, child_keys, child_values = (
        tensor.contiguous() for tensor in (x, parent_keys, child_keys, child_values)
    )
    output = torch.empty_like(x)
    is_bfloat16 = x.dtype == torch.bfloat16
    is_shared = num_parents <= _SHARED * top_k
    many = x.shape[0] * num_parents >= _MANY_SCORES and not is_bfloat16 and not is_shared
    scores = torch.mm(x, parent_keys.t()) if many else None
    arguments = _Memory(
        *(x.shape[0], hidden, num_parents, num_children, top_k, torch.get_num_threads()),
        *(is_bfloat16, is_shared, temperature),
        *(tensor.data_ptr() for tensor in (x, parent_keys, child_keys, child_values)),
        None if scores is None else scores.data_ptr(),
        output.data_ptr(),
    )
    library().memory_read(ctypes.byref(arguments), native.openmp_parallel())
    return output


@functools.cache
def library() -> ctypes.CDLL:
    """Return the memory's kernels; see :func:`why_not_built`."""
    loaded = native.load_library(_SOURCES)
    for function in (loaded.memory_read, loaded.memory_forward, loaded.memory_backward):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    loaded.memory_columns.argtypes, loaded.memory_columns.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
    return loaded
