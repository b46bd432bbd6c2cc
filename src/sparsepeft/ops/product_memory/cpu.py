"""Compiled for CPUs, float32: the search, the read and its gradients."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops import native
from sparsepeft.ops.product_memory.children import Form, Pairs, Read
from sparsepeft.ops.product_memory.update import AdamStep, Rows

_SOURCES = Path(__file__).parent / "csrc"
_SIZES = ("tokens", "hidden", "top_k", "children", "threads")


def _fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names)


# As csrc/kernel.cpp has them.
class _Search(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "tokens", "first_size", "second_size", "top_k", "threads"),
        *_fields(ctypes.c_void_p, "first", "second", "parents"),
    )


class _Children(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, *_SIZES),
        ("temperature", ctypes.c_double),
        *_fields(ctypes.c_void_p, "x", "parents", "gate", "child_keys", "child_values", "attention", "output"),
    )


class _Gradients(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "grad_output", "grad_x", "grad_gate", "of_values", "of_scores")


class _Cells(ctypes.Structure):
    _fields_ = (
        ("touched", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "pairs", "ends", "rows", "grad_keys", "grad_values"),
        ("num_rows", ctypes.c_int64),
    )


class _Update(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "touched", "width", "threads"),
        *_fields(ctypes.c_void_p, "rows", "slots", "gradient", "table", "first", "second"),
        *_fields(ctypes.c_double, *AdamStep._fields),
    )


@functools.cache
def why_not_built() -> str | None:
    """Return why this machine has no compiled kernel, or None; builds it (a few seconds) at the first call."""
    return native.why_not_built(_library)


def select_pairs_cpu(first: Tensor, second: Tensor, top_k: int) -> Tensor:
    """As :func:`sparsepeft.ops.product_memory.search.select_pairs`, for float32 on the CPU."""
    first, second = first.contiguous(), second.contiguous()
    parents = torch.empty((len(first), top_k), dtype=torch.long)
    arguments = _Search(
        *(len(first), first.shape[1], second.shape[1], top_k, torch.get_num_threads()),
        *(tensor.data_ptr() for tensor in (first, second, parents)),
    )
    _library().product_memory_search(ctypes.byref(arguments), native.openmp_parallel())
    return parents


def _read(read: Read) -> tuple[Tensor, Tensor]:
    read = _contiguous(read)
    attention = torch.empty((*read.parents.shape, read.child_keys.shape[1]))
    output = torch.empty_like(read.x)
    _library().product_memory_read(ctypes.byref(_children(read, attention, output)), native.openmp_parallel())
    return output, attention


def _differentiate(
    read: Read, attention: Tensor, grad_output: Tensor, pairs: Pairs | None, num_rows: int
) -> tuple[Tensor, ...]:
    read, parallel = _contiguous(read), native.openmp_parallel()
    children = _children(read, attention, None)
    grad_x, grad_gate = torch.empty_like(read.x), torch.empty_like(read.gate)
    of_cells = [torch.empty_like(attention) for _ in range(2)]
    gradients = _Gradients(*(tensor.data_ptr() for tensor in (grad_output, grad_x, grad_gate, *of_cells)))
    _library().product_memory_backward(ctypes.byref(children), ctypes.byref(gradients), parallel)
    if pairs is None:
        return grad_x, grad_gate
    allocate = torch.empty if num_rows == len(pairs.touched) else torch.zeros
    grad_cells = [allocate((num_rows, *read.child_keys.shape[1:])) for _ in range(2)]
    ends, rows = pairs.counts.cumsum(0), pairs.rows.contiguous()
    cells = _Cells(
        len(pairs.touched),
        *(tensor.data_ptr() for tensor in (pairs.order, ends, rows, *grad_cells)),
        num_rows,
    )
    _library().product_memory_cells(ctypes.byref(children), ctypes.byref(gradients), ctypes.byref(cells), parallel)
    return grad_x, grad_gate, *grad_cells


def update_rows_cpu(rows: Rows, step: AdamStep) -> None:
    """As :func:`sparsepeft.ops.product_memory.update.update_rows`, for contiguous float32 on the CPU."""
    tensors = [rows.rows.contiguous(), rows.slots.contiguous(), rows.gradient.contiguous(), *rows[3:]]
    arguments = _Update(
        *(len(rows.rows), rows.table[0].numel(), torch.get_num_threads()),
        *(tensor.data_ptr() for tensor in tensors),
        *step,
    )
    _library().product_memory_update(ctypes.byref(arguments), native.openmp_parallel())
    torch.autograd.graph.increment_version(rows.table)  # a graph that has kept it must not be used any more


COMPILED = Form(_read, _differentiate)


def _contiguous(read: Read) -> Read:
    x, gate, parents, child_keys, child_values = (tensor.contiguous() for tensor in read[:5])
    return Read(x, gate, parents, child_keys, child_values, read.temperature)


def _children(read: Read, attention: Tensor, output: Tensor | None) -> _Children:
    """The struct; the tensors must outlive it."""
    sizes = (*read.x.shape, read.parents.shape[1], read.child_keys.shape[1], torch.get_num_threads())
    tensors = (read.x, read.parents, read.gate, read.child_keys, read.child_values, attention)
    return _Children(
        *sizes,
        read.temperature,
        *(tensor.data_ptr() for tensor in tensors),
        None if output is None else output.data_ptr(),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load_library(_SOURCES)
    for name, num_arguments in (("search", 2), ("read", 2), ("backward", 3), ("cells", 4), ("update", 2)):
        function = getattr(library, f"product_memory_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p] * num_arguments, None
    return library
