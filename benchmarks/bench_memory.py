"""Speed of memory_read: dense, selected, and a plain gather, over the number of parents.

    python benchmarks/bench_memory.py --output benchmarks/results/memory.json
    python benchmarks/bench_memory.py --device cuda --dtype bfloat16 --output benchmarks/results/memory_gpu.json

Every implementation is first compared with the reference. Times are of one call, forward, and forward with backward to
the hidden states and the whole memory. On a GPU the fused form is a candidate too, where it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from _common import describe_environment, require_agreement, time_alternating, write_json
from sparsepeft.ops import explain_memory_impl, memory_read

Read = Callable[..., Tensor]
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
    return partial(memory_read, impl=name)


def train(read: Read, tensors: list[Tensor], grad_output: Tensor, top_k: int) -> list[Tensor]:
    """Return the output and the gradients of one forward and backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = read(*leaves, top_k=top_k)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def verify(case: Case, tensors: list[Tensor], grad_output: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Compare every candidate with the reference: a full forward pass, and gradients from 64 tokens.

    In float32; then in ``dtype`` against the masked form in float32, with all parents kept: near ties may be rounded to
    another selection.
    """
    x, *memory = tensors
    few = slice(0, 64)  # the reference gathers: too large for all tokens of a large memory
    expected = train(reader("reference"), [x[few], *memory], grad_output[few], case.top_k)
    errors = {}
    for name in case.candidates:
        read = reader(name)
        actual = train(read, [x[few], *memory], grad_output[few], case.top_k)
        error = require_agreement(name, actual, expected, tolerance=TOLERANCE)
        with torch.no_grad():
            output = read(*tensors, top_k=case.top_k)[few]
        errors[name] = max(error, require_agreement(name, [output], expected[:1], tolerance=TOLERANCE))
    if dtype != torch.float32:
        narrow = [tensor[:64].to(dtype) if tensor is tensors[0] else tensor.to(dtype) for tensor in tensors]
        expected = train(reader("masked"), [t.float() for t in narrow], grad_output[:64], case.num_parents)
        for name in case.candidates:
            actual = train(reader(name), narrow, grad_output[:64].to(dtype), case.num_parents)
            require_agreement(name, [t.float() for t in actual], expected, tolerance=HALF_TOLERANCE)
    return errors


def run(case: Case, repeats: int, seed: int, idle_wait_s: float, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Verify, then time, one case."""
    choice = explain_memory_impl(
        num_parents=case.num_parents, num_children=case.num_children, top_k=case.top_k, on_gpu=device == "cuda"
    )
    if choice.impl == "triton":
        case = case._replace(candidates=(*case.candidates, "triton"))
    generator = torch.Generator().manual_seed(seed)
    parents, children, hidden = case.num_parents, case.num_children, case.hidden_size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    x, grad_output = normal(case.num_tokens, hidden), normal(case.num_tokens, hidden)
    memory = [normal(*shape, hidden, scale=0.02) for shape in ((parents,), (parents, children), (parents, children))]
    tensors = [x, *memory]
    errors = verify(case, tensors, grad_output, dtype)
    tensors, grad_output = [tensor.to(dtype) for tensor in tensors], grad_output.to(dtype)

    num_weights = case.num_tokens * parents * children
    repeats = repeats if num_weights < MAX_TRAINED_WEIGHTS else max(3, repeats // 4)
    readers = {name: reader(name) for name in case.candidates}
    measure = partial(time_alternating, repeats=repeats, warm_up=1, idle_wait_s=idle_wait_s, device=device)
    with torch.no_grad():
        forward = measure({name: partial(read, *tensors, top_k=case.top_k) for name, read in readers.items()})
    if num_weights > MAX_TRAINED_WEIGHTS:
        del readers["masked"]
    training = measure({name: partial(train, read, tensors, grad_output, case.top_k) for name, read in readers.items()})
    return {
        **case._asdict(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "chosen": choice.impl,
        "reason": choice.reason,
        "largest_relative_error": errors,
        "forward": {name: timing._asdict() for name, timing in forward.items()},
        "forward_backward": {name: timing._asdict() for name, timing in training.items()},
        "auto_speedup": {
            direction: {
                name: timing.median_ms / timings["auto"].median_ms for name, timing in timings.items() if name != "auto"
            }
            for direction, timings in (("forward", forward), ("forward_backward", training))
        },
    }


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each candidate; fewer for the largest")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument(
        "--idle-wait",
        type=float,
        default=0.0,
        help="seconds to wait for an idle machine before each round",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the candidates run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0, help="of the random memory and hidden states")
    parser.add_argument("--quick", action="store_true", help="a tiny case, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    environment = describe_environment(seed=arguments.seed)
    results: list[dict[str, Any]] = []
    for case in cases(arguments.quick):
        dtype = getattr(torch, arguments.dtype)
        result = run(case, arguments.repeats, arguments.seed, arguments.idle_wait, arguments.device, dtype)
        results.append(result)
        for direction in ("forward", "forward_backward"):
            times = ", ".join(f"{name} {timing['median_ms']:.3g}" for name, timing in result[direction].items())
            shape = f"N={case.num_tokens} P={case.num_parents} C={case.num_children} K={case.top_k}"
            print(f"{case.name}: {shape} {direction} ms: {times}; auto = {result['chosen']}", flush=True)
    write_json(arguments.output, {"environment": environment, "results": results})


if __name__ == "__main__":
    main()
