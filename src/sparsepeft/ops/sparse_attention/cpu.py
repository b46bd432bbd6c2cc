"""Compiled for CPUs, both granularities: the binding of the kernels in ``csrc``.

They take float32, bfloat16 and float16, and sum in float32.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sparsepeft.ops import native
from sparsepeft.ops.numerics import rows_contiguous
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility
from sparsepeft.ops.sparse_attention.selection import BlockLists, Selection
from sparsepeft.ops.sparse_attention.similarity import Codes, weighted_words

SOURCES = Path(__file__).parent / "csrc"
_MAX_HEAD_SIZE = 256
_MAX_SUBVECTORS = 250  # matches are counted in bytes
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGNMENT = 64


class _View(ctypes.Structure):
    """`View` of csrc/common.h."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class _Problem(ctypes.Structure):
    """`Problem` of csrc/common.h."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "heads", "kv_heads", "queries", "keys", "head_size", "value_size")),
        *((n, ctypes.c_int64) for n in ("subvectors", "codewords", "width")),
        *((n, ctypes.c_int64) for n in ("top_l", "keep_self", "keep_first", "block_size", "list_stride")),
        *((n, ctypes.c_int64) for n in ("dtype", "grad_dtype", "threads", "parts")),
        *((n, ctypes.c_double) for n in ("scale", "softcap")),
        *((n, _View) for n in ("query", "key", "value", "output", "grad_output")),
        *((n, _View) for n in ("grad_query", "grad_key", "grad_value")),
        *((n, ctypes.c_void_p) for n in ("query_codes", "key_codes", "key_mask", "codebooks")),
        *((n, ctypes.c_void_p) for n in ("positions", "lower", "upper")),
        *((n, ctypes.c_void_p) for n in ("lists", "counts", "log_sum_exp", "scratch")),
        ("scratch_bytes", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )


class _Encoding(ctypes.Structure):
    """`Encoding` of csrc/encode.h."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "heads", "kv_heads", "tokens", "subvectors", "codewords", "width")),
        *((n, ctypes.c_int64) for n in ("dtype", "threads")),
        ("vectors", _View),
        *((n, ctypes.c_void_p) for n in ("codebooks", "half_norms", "codes", "parallel")),
    )


@functools.cache
def why_not_built() -> str | None:
    """Return why this machine has no compiled kernels, or None. The first call builds them, or warns that it cannot."""
    try:
        _library()
    except native.BuildError as error:
        warnings.warn(
            f"sparse attention's compiled kernels are not available ({error}) Plain PyTorch is used instead: the same "
            "results in linear memory, but slower than dense attention. Install a C++ compiler (g++ or clang++, or "
            "name one in $CXX) for speed.",
            stacklevel=2,
        )
        return f"the compiled kernels are not available ({error})"
    return None


def why_not_cpu(query: Tensor, value: Tensor, num_subvectors: int, *, inner_product: bool) -> str | None:
    """Return why the kernels cannot take these tensors, or None; whether they can be built is not asked here."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}, the compiled kernels run on a CPU"
    if query.dtype not in _DTYPES:
        return f"the tensors are {query.dtype}, the compiled kernels take float32, bfloat16 and float16"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_SIZE:
        return f"the head size is {max(query.shape[-1], value.shape[-1])}, the compiled kernels take {_MAX_HEAD_SIZE}"
    if num_subvectors > _MAX_SUBVECTORS and not inner_product:
        return f"there are {num_subvectors} sub-vectors, the compiled kernels take {_MAX_SUBVECTORS}"
    return None


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the output, (B, H, Tq, Dv), and the log-sum-exp of the scores, float32, (B, H, Tq)."""
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = torch.empty(query.shape[:3])
    problem, keep_alive = _problem(query, key, value, selection, visibility, settings)
    problem.output, problem.log_sum_exp = _view(output), log_sum_exp.data_ptr()
    _run(problem, backward=False)
    del keep_alive
    return output, log_sum_exp


def cpu_backward(
    grad_output: Tensor, attended: Attended, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value. Token granularity selects again from the codes."""
    query, key, value, output, log_sum_exp = attended
    problem, keep_alive = _problem(query, key, value, selection, visibility, settings)
    grad_output = rows_contiguous(grad_output)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Threads that share a head's keys add up in float32.
    dtype = torch.float32 if problem.parts > 1 else key.dtype
    grad_key, grad_value = (torch.empty(t.shape, dtype=dtype) for t in (key, value))
    problem.grad_dtype = _DTYPES[dtype]
    problem.grad_query, problem.grad_key, problem.grad_value = map(_view, (grad_query, grad_key, grad_value))
    problem.output, problem.grad_output = _view(output), _view(grad_output)
    problem.log_sum_exp = log_sum_exp.data_ptr()
    _run(problem, backward=True)
    del keep_alive
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def cpu_keep_tokens(query: Tensor, codes: Codes, visibility: Visibility, settings: Settings) -> Tensor:
    """Return which keys each query keeps, bool, (B, H, Tq, Tk): the kernel's selection, to be looked at."""
    kept = torch.zeros(*query.shape[:3], codes.keys.shape[2], dtype=torch.bool)
    _select(query, codes, visibility, settings, kept)
    return kept


def cpu_select(query: Tensor, codes: Codes, visibility: Visibility, settings: Settings) -> None:
    """Select the keys of each query and forget them: what the selection by itself takes."""
    _select(query, codes, visibility, settings, None)


def _select(query: Tensor, codes: Codes, visibility: Visibility, settings: Settings, kept: Tensor | None) -> None:
    key = query.new_empty(1).expand(*codes.keys.shape[:3], query.shape[-1])  # it is not read
    problem, keep_alive = _problem(query, key, key, codes, visibility, settings)
    scratch = _scratch(problem, backward=False)
    _library().sparse_attention_select(
        ctypes.byref(problem), ctypes.c_void_p(kept.data_ptr() if kept is not None else None)
    )
    del keep_alive, scratch


def encode_cpu(vectors: Tensor, codebooks: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """Return the codes; see :func:`encode`."""
    vectors = rows_contiguous(vectors)
    batch, heads, num_tokens, _ = vectors.shape
    kv_heads, num_subvectors, num_codewords, width = codebooks.shape
    words, half_norms = (tensor.contiguous() for tensor in weighted_words(codebooks.float(), channel_weights))
    codes = torch.empty(batch, heads, num_tokens, num_subvectors, dtype=torch.uint8)
    encoding = _Encoding(batch, heads, kv_heads, num_tokens, num_subvectors, num_codewords, width)
    encoding.dtype, encoding.threads = _DTYPES[vectors.dtype], torch.get_num_threads()
    encoding.vectors, encoding.codes = _view(vectors), codes.data_ptr()
    encoding.codebooks, encoding.half_norms = words.data_ptr(), half_norms.data_ptr()
    encoding.parallel = native.openmp_parallel()
    _library().sparse_attention_encode(ctypes.byref(encoding))
    return codes


def _problem(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, visibility: Visibility, settings: Settings
) -> tuple[_Problem, list[Tensor]]:
    """Return the kernel's arguments, and the tensors that must outlive the call."""
    tensors = [rows_contiguous(tensor) for tensor in (query, key, value)]
    (batch, heads, num_queries, head_size), (kv_heads, num_keys) = query.shape, key.shape[1:3]
    problem = _Problem(batch, heads, kv_heads, num_queries, num_keys, head_size, value.shape[-1])
    problem.top_l, problem.scale, problem.softcap = settings.top_l, settings.scale, settings.softcap
    problem.keep_self, problem.keep_first = settings.keep_self, settings.keep_first
    problem.block_size = settings.block_size
    problem.query, problem.key, problem.value = map(_view, tensors)
    problem.dtype = _DTYPES[query.dtype]
    problem.threads, problem.parallel = torch.get_num_threads(), native.openmp_parallel()
    problem.parts = _num_parts(batch * kv_heads, problem.threads)

    if isinstance(selection, BlockLists):
        selected = [tensor.contiguous() for tensor in selection]
        problem.lists, problem.counts = (tensor.data_ptr() for tensor in selected)
        problem.list_stride = selection.indices.shape[-1]
    else:
        keys, queries, codebooks = selection
        selected = [keys.contiguous(), codebooks.float().contiguous() if queries is None else queries.contiguous()]
        problem.key_codes, other = (tensor.data_ptr() for tensor in selected)
        problem.codebooks, problem.query_codes = (other, None) if queries is None else (None, other)
        problem.subvectors, problem.codewords, problem.width = codebooks.shape[1:]
    limits = [visibility.positions, visibility.lower, visibility.upper]
    problem.positions, problem.lower, problem.upper = (tensor.data_ptr() for tensor in limits)
    if visibility.key_mask is not None:
        limits.append(visibility.key_mask)
        problem.key_mask = visibility.key_mask.data_ptr()
    return problem, [*tensors, *selected, *limits]


def _num_parts(groups: int, threads: int) -> int:
    """Return into how many parts the queries of a group (one batch row, one key head) are cut, for all threads to work.

    None where whole groups divide well among the threads; else as few as divide evenly or nearly so, since each part
    reads the group's keys anew.
    """
    return min(threads // math.gcd(groups, threads), -(-4 * threads // groups))


def _run(problem: _Problem, *, backward: bool) -> None:
    scratch = _scratch(problem, backward=backward)
    _library().sparse_attention_run(ctypes.byref(problem), ctypes.c_int64(backward))
    del scratch


def _scratch(problem: _Problem, *, backward: bool) -> Tensor:
    """Give every thread its scratch memory: a head's keys and values in float32, and a block of queries."""
    size = _library().sparse_attention_scratch_bytes(ctypes.byref(problem), ctypes.c_int64(backward))
    scratch = torch.empty(problem.threads * size + _ALIGNMENT, dtype=torch.uint8)
    problem.scratch, problem.scratch_bytes = scratch.data_ptr() + -scratch.data_ptr() % _ALIGNMENT, size
    return scratch


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load_library(SOURCES)
    library.sparse_attention_scratch_bytes.restype = ctypes.c_int64
    return library


def _view(tensor: Tensor) -> _View:
    return _View(tensor.data_ptr(), *tensor.stride()[:3])
