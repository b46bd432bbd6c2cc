"""Which implementation of the memory ``impl="auto"`` means.

Without gradients, on a CPU, it is the form that was measured to be the fastest on this machine
(:mod:`sparsepeft.ops.memory.inference`). Else the rule compares the work per token of two forms, in products with a
vector of size D. Scoring the parents is common to both and left out.
``benchmarks/results/memory.json`` (2-core x86, float32, D=768, K=8) shows the crossover at P between 64 and 128 for
C=3 and between 16 and 32 for C=32; the constants reproduce it, and were checked at K=1, 2 and 16 with C=1 to 32.
Neither D nor, from one token to thousands, the number of tokens moves the crossover much: the rule leaves them out,
so that a traced graph is chosen as the eager call is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.memory.compiled import why_not_built
from sparsepeft.ops.memory.inference import inference_times
from sparsepeft.ops.native import readable

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Columns of a tile of scores, both sizes padded: up to here the fused form's registers are known not to spill.
_MAX_FUSED_COLUMNS = 512
# A child's key and value read through the grouped, smaller products of the selected form: dense work is 2.
_SELECTED_CHILD_WORK = 3
# Gathering a token's vector for one parent and adding back what that parent read.
_SELECTED_PAIR_WORK = 80
# torch.export: keys and values of each selected child are gathered, nothing is shared between tokens. Measured with
# 256 tokens and K=8: even at about 350 parents, for C=3 and for C=32.
_GATHERED_CHILD_WORK = 100


class MemoryChoice(NamedTuple):
    """An implementation of :func:`memory_read` and, in a sentence, why it was chosen."""

    impl: str
    reason: str


def choose_memory_impl(
    num_parents: int,
    num_children: int,
    top_k: int,
    *,
    exporting: bool = False,
    on_gpu: bool = False,
) -> str:
    """Return the name alone: the sizes may be symbolic while ``torch.compile`` traces, and then have no text."""
    if on_gpu and _HAS_TRITON and not exporting and _fits_tile(num_parents, num_children):
        return "triton"
    masked, selected = _work(num_parents, num_children, top_k, exporting)
    return "selected" if selected < masked else "masked"


def choose_inference_impl(x: Tensor, child_keys: Tensor, top_k: int) -> str:
    """Return the fastest form for tensors that :func:`is_inference` holds for, ``child_keys`` (..., P, C, D)."""
    num_parents, num_children, hidden = child_keys.shape[-3:]
    num_tokens = x.numel() // hidden
    return next(iter(inference_times(num_tokens, hidden, num_parents, num_children, top_k, x.dtype)))


def explain_memory_impl(
    *,
    num_parents: int,
    num_children: int,
    top_k: int,
    exporting: bool = False,
    on_gpu: bool = False,
    inference: bool = False,
    num_tokens: int = 4096,
    hidden_size: int = 768,
    dtype: torch.dtype = torch.float32,
) -> MemoryChoice:
    """Return the implementation ``impl="auto"`` picks for a memory of this shape, with the reason.

    Args:
        num_parents: P.
        num_children: children per parent, C.
        top_k: parents kept per token, K.
        exporting: whether ``torch.export`` is tracing; the selected form then has to gather.
        on_gpu: whether the tensors are on a CUDA device, in float32 or narrower; the fused form can run then.
        inference: whether no gradient is needed, products are taken in float32 on a CPU, and nothing is traced: the
            forms are then measured on this machine, which takes milliseconds where it has not been done before.
        num_tokens: tokens read at once; counts in inference alone, as the two below.
        hidden_size: D.
        dtype: of the hidden states.
    """
    shape = f"P={num_parents}, C={num_children}, K={top_k}{', exported' if exporting else ''}"
    if inference:
        times = inference_times(num_tokens, hidden_size, num_parents, num_children, top_k, dtype)
        measured = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items())
        missing = why_not_built()
        return MemoryChoice(
            next(iter(times)),
            f"Without gradients, for about {num_tokens} tokens at {shape}, the fastest of what was measured on this "
            f"machine with {torch.get_num_threads()} threads: {measured}"
            f"{'.' if missing is None else f'; there is no compiled form: {missing}'}",
        )
    impl = choose_memory_impl(num_parents, num_children, top_k, exporting=exporting, on_gpu=on_gpu)
    if impl == "triton":
        return MemoryChoice(
            impl,
            f"On a GPU, at {shape}, one kernel reads the hidden states once and writes them once; its speed has not "
            "been measured yet.",
        )
    masked, selected = _work(num_parents, num_children, top_k, exporting)
    return MemoryChoice(
        impl,
        f"At {shape}, reading only the selected children costs as much as {selected} products with a vector per token, "
        f"{'less' if selected < masked else 'no less'} than the {masked} of the masked dense form.",
    )


def padded_sizes(num_parents: int, num_children: int) -> tuple[int, int]:
    """Return the parents and children that the fused form's tiles have: powers of two, and 16 parents at least.

    16 is the least that a matrix unit takes. No bit tricks: the sizes may be symbolic.
    """
    parents, children = 16, 1
    while parents < num_parents:
        parents *= 2
    while children < num_children:
        children *= 2
    return parents, children


def can_fuse(*tensors: Tensor) -> bool:
    """Whether hidden states and a memory are where the fused form runs, and no wider than it computes."""
    return all(tensor.is_cuda and tensor.element_size() <= 4 for tensor in tensors)


def require_triton(x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor) -> None:
    """Raise where the fused form cannot run on these tensors, ``child_keys`` (..., P, C, D).

    Raises:
        ValueError: no Triton, no GPU, float64, or too large a memory.
    """
    num_parents, num_children = child_keys.shape[-3:-1]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, slowly
    if not _HAS_TRITON:
        problem = "the package triton is not installed: install it, or leave impl at 'auto'"
    elif not x.is_cuda and not interpreted:
        problem = f"x is on {x.device}, expected a CUDA device: move it there, or leave impl at 'auto'"
    elif torch.float64 in (x.dtype, parent_keys.dtype, child_keys.dtype, child_values.dtype):
        problem = "a tensor is float64; expected float32 or narrower: convert it, or leave impl at 'auto'"
    elif not _fits_tile(num_parents, num_children):
        problem = (
            f"P={num_parents} and C={num_children} are too many for a tile (padded to powers of two, P * C may be "
            f"{_MAX_FUSED_COLUMNS}): leave impl at 'auto'"
        )
    else:
        return
    raise ValueError(f"impl is 'triton', but {problem}.")


def is_inference(*tensors: Tensor) -> bool:
    """Whether hidden states and a memory (three tensors) are read in float32 on a CPU, without gradient or graph.

    Then the compiled form may read them; whether it can be built is not asked here.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and readable(*tensors)
        and _common_dtype(tensors) == torch.float32
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and torch.autograd.forward_ad._current_level < 0  # no_grad does not end forward-mode differentiation
    )


def _common_dtype(tensors: tuple[Tensor, ...]) -> torch.dtype:
    first, *others = {tensor.dtype for tensor in tensors}
    return functools.reduce(torch.promote_types, others, first)


def require_compiled(*tensors: Tensor) -> None:
    """Raise where the compiled form cannot run on hidden states and a memory (three tensors).

    Raises:
        ValueError: they are not plain float32 tensors on a CPU, need a gradient, or are traced.
        RuntimeError: it cannot be built.
    """
    if not is_inference(*tensors):
        kinds = ", ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors}))
        raise ValueError(
            f"impl is 'cpu', but hidden states and memory are {kinds}, or a gradient or a traced graph is wanted; the "
            "compiled form reads float32 on a CPU under torch.no_grad(): leave impl at 'auto'."
        )
    reason = why_not_built()
    if reason is not None:
        raise RuntimeError(f"impl is 'cpu', but the compiled form cannot be had ({reason}) Leave impl at 'auto'.")


def _fits_tile(num_parents: int, num_children: int) -> bool:
    parents, children = padded_sizes(num_parents, num_children)
    return parents * children <= _MAX_FUSED_COLUMNS


def _work(num_parents: int, num_children: int, top_k: int, exporting: bool) -> tuple[int, int]:
    masked = 2 * num_parents * num_children
    if exporting:
        return masked, _GATHERED_CHILD_WORK * top_k * num_children
    return masked, top_k * (_SELECTED_CHILD_WORK * num_children + _SELECTED_PAIR_WORK)
