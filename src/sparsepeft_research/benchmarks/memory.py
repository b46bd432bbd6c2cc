"""Speed of memory_read: dense, selected, and a plain gather, over the number of parents.

    sparsepeft benchmark memory --output research/results/benchmarks/memory.json
    sparsepeft benchmark memory --device cuda --dtype bfloat16 --output research/results/benchmarks/memory_gpu.json

Every implementation is first compared with the reference. Times are of one call, forward, and forward with backward to
the hidden states and the whole memory. On a GPU the fused form is a candidate too, where it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops import explain, memory_read
from sparsepeft.ops.memory.pytorch import memory_read_dense
from sparsepeft.ops.memory.pytorch_selected import memory_read_selected
from sparsepeft.tuners.config import dtype_name
from sparsepeft_research.benchmarks.measuring import as_dicts, forward_backward, require_agreement, time_alternating
from sparsepeft_research.benchmarks.registry import Progress

Read = Callable[..., Tensor]
# The two forms between which impl="torch" chooses; result files call the dense one masked.
FORMS: dict[str, Read] = {"masked": memory_read_dense, "selected": memory_read_selected}
# Float32 rounding over sums of up to 4096 terms; a wrongly selected parent would show as 1e-2 or more.
TOLERANCE = 1e-4
# A few roundings of bfloat16 (4e-3) in sums of 64 tokens.
HALF_TOLERANCE = 3e-2
# Masked dense training keeps several (tokens, P * C) tensors: beyond this many entries it is not timed.
MAX_TRAINED_WEIGHTS = 1 << 26


class Case(NamedTuple):
    """One memory and the number of tokens that read it."""

    name: str
    num_tokens: int
    hidden_size: int
    num_parents: int
    num_children: int
    top_k: int
    candidates: tuple[str, ...]


def cases(quick: bool) -> list[Case]:
    """Return the cases; the quick ones only show that the script works."""
    if quick:
        return [Case("quick", 64, 32, 40, 3, 4, ("gather", "masked", "selected", "auto"))]
    forms = ("masked", "selected", "auto")
    paper = Case("paper", 4096, 768, 16, 3, 8, ("gather", *forms))
    wide = Case("P=64 at 4096 tokens", 4096, 768, 64, 32, 8, forms)
    parents = (16, 32, 64, 128, 256, 512, 1024, 4096)
    sweep = [Case("sweep", 2048, 768, num, children, 8, forms) for children in (3, 32) for num in parents]
    few = [Case("32 tokens", 32, 768, num, children, 8, forms) for children in (3, 32) for num in (16, 256, 4096)]
    return [paper, wide, *sweep, *few]


def gather_read(x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, *, top_k: int) -> Tensor:
    """Read the memory as one writes it first: gather the selected children of every token."""
    best, selected = (x @ parent_keys.T).topk(top_k, dim=-1)
    attention = torch.einsum("nd,nkcd->nkc", x, child_keys[selected]).softmax(-1)
    weights = best.softmax(-1).unsqueeze(-1) * attention
    return x + torch.einsum("nkc,nkcd->nd", weights, child_values[selected])


def reader(name: str) -> Read:
    """Return the candidate of this name."""
    if name == "gather":
        return gather_read
    if name in FORMS:
        return partial(FORMS[name], temperature=1.0)
    return partial(memory_read, impl=name)


def verify(case: Case, tensors: list[Tensor], grad_output: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Compare every candidate with the reference: a full forward pass, and gradients from 64 tokens.

    In float32; then in ``dtype`` against the masked form in float32, with all parents kept: near ties may be rounded to
    another selection.
    """
    x, *memory = tensors
    few = slice(0, 64)  # the reference gathers: too large for all tokens of a large memory
    expected = forward_backward(partial(reader("reference"), top_k=case.top_k), [x[few], *memory], grad_output[few])
    errors = {}
    for name in case.candidates:
        read = partial(reader(name), top_k=case.top_k)
        actual = forward_backward(read, [x[few], *memory], grad_output[few])
        error = require_agreement(name, actual, expected, tolerance=TOLERANCE)
        with torch.no_grad():
            output = read(*tensors)[few]
        errors[name] = max(error, require_agreement(name, [output], expected[:1], tolerance=TOLERANCE))
    if dtype != torch.float32:
        every = case.num_parents
        narrow = [tensor[:64].to(dtype) if tensor is tensors[0] else tensor.to(dtype) for tensor in tensors]
        expected = forward_backward(
            partial(reader("masked"), top_k=every), [t.float() for t in narrow], grad_output[:64]
        )
        for name in case.candidates:
            actual = forward_backward(partial(reader(name), top_k=every), narrow, grad_output[:64].to(dtype))
            require_agreement(name, [t.float() for t in actual], expected, tolerance=HALF_TOLERANCE)
    return errors


def measure(case: Case, repeats: int, seed: int, idle_wait_s: float, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Verify, then time, one case."""
    generator = torch.Generator().manual_seed(seed)
    parents, children, hidden = case.num_parents, case.num_children, case.hidden_size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    x, grad_output = normal(case.num_tokens, hidden), normal(case.num_tokens, hidden)
    memory = [normal(*shape, hidden, scale=0.02) for shape in ((parents,), (parents, children), (parents, children))]
    tensors = [x, *memory]
    choice = explain(memory_read, x.requires_grad_(), *memory, top_k=case.top_k)
    if choice.impl == "triton":
        case = case._replace(candidates=(*case.candidates, "triton"))
    x.requires_grad_(False)
    errors = verify(case, tensors, grad_output, dtype)
    tensors, grad_output = [tensor.to(dtype) for tensor in tensors], grad_output.to(dtype)

    num_weights = case.num_tokens * parents * children
    repeats = repeats if num_weights < MAX_TRAINED_WEIGHTS else max(3, repeats // 4)
    readers = {name: partial(reader(name), top_k=case.top_k) for name in case.candidates}
    timed = partial(time_alternating, repeats=repeats, warm_up=1, idle_wait_s=idle_wait_s, device=device)
    with torch.no_grad():
        forward = timed({name: partial(read, *tensors) for name, read in readers.items()})
    if num_weights > MAX_TRAINED_WEIGHTS:
        del readers["masked"]
    training = timed({name: partial(forward_backward, read, tensors, grad_output) for name, read in readers.items()})
    return {
        **case._asdict(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "chosen": choice.impl,
        "reason": choice.reason,
        "largest_relative_error": errors,
        "forward": as_dicts(forward),
        "forward_backward": as_dicts(training),
        "auto_speedup": {
            direction: {
                name: timing.median_ms / timings["auto"].median_ms for name, timing in timings.items() if name != "auto"
            }
            for direction, timings in (("forward", forward), ("forward_backward", training))
        },
    }


def run(
    *, repeats: int, idle_wait: float, device: str, dtype: str, seed: int, quick: bool, progress: Progress
) -> dict[str, Any]:
    """Measure all cases.

    Raises:
        UserError: ``dtype`` is none of ours or PyTorch's.
    """
    torch_dtype = getattr(torch, dtype_name("dtype", dtype))
    results = []
    for case in cases(quick):
        results.append(measure(case, repeats, seed, idle_wait, device, torch_dtype))
        for direction in ("forward", "forward_backward"):
            times = ", ".join(f"{name} {timing['median_ms']:.3g}" for name, timing in results[-1][direction].items())
            shape = f"N={case.num_tokens} P={case.num_parents} C={case.num_children} K={case.top_k}"
            progress(f"{case.name}: {shape} {direction} ms: {times}; auto = {results[-1]['chosen']}")
    return {"results": results}
