"""Speed and kept memory of routed_ffn against the dense FFN, over the number of active blocks.

    sparsepeft benchmark routed_ffn --output routed_ffn.json
    sparsepeft benchmark routed_ffn --device cuda --output routed_ffn_gpu.json

Every implementation is first compared with the reference. Times are of one call, forward, and forward with backward to
the hidden states and the router, with frozen FFN weights or (marked) trained ones. ``dense`` is the FFN without a
router. ``share`` is the part of the dense FFN's multiply-adds that is left: 1 / share is what the arithmetic allows.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops import Projection, route, routed_ffn
from sparsepeft.ops.routed_ffn.projections import resolve_activation
from sparsepeft_research.benchmarks.measuring import as_dicts, require_agreement, time_alternating
from sparsepeft_research.benchmarks.registry import Progress

# Relative to the largest entry. Float32 rounding over sums of up to 16384 terms; a wrongly chosen block would show as
# 1e-1. bfloat16: a few of its roundings, of 4e-3 each, one of which may cross ReLU's kink.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


class Case(NamedTuple):
    """One FFN."""

    name: str
    num_tokens: int
    hidden_size: int
    inner_size: int
    num_blocks: int
    active: tuple[int, ...]
    gated: bool
    activation: str
    trained: bool = False
    dtype: torch.dtype = torch.float32


def cases(quick: bool, device: str) -> list[Case]:
    """Return the cases; the quick ones only show that the script works."""
    if quick:
        return [Case("quick", 64, 32, 128, 4, (2,), gated, "relu") for gated in (False, True)]
    if device == "cuda":
        opt = Case("OPT-like", 8192, 2560, 10240, 8, (2, 4, 6, 8), False, "relu", dtype=torch.bfloat16)
        llama = Case("Llama-like", 8192, 4096, 11264, 8, (2, 4, 6, 8), True, "silu", dtype=torch.bfloat16)
        return [opt, llama, llama._replace(name="Llama-like, trained", active=(4,), trained=True)]
    opt = Case("OPT-like", 2048, 1024, 4096, 8, (2, 4, 6, 8), False, "relu")
    gelu = opt._replace(name="GELU", activation="gelu", active=(2, 4))
    llama = Case("Llama-like", 2048, 1024, 2816, 8, (2, 4), True, "silu")
    return [
        opt,
        opt._replace(name="OPT-like, 512 tokens", num_tokens=512, active=(4,)),
        opt._replace(name="OPT-like, one token", num_tokens=1, active=(4,)),
        gelu,
        llama,
        opt._replace(name="OPT-like, trained", active=(4,), trained=True),
        opt._replace(name="OPT-like, bfloat16", active=(4,), dtype=torch.bfloat16),
    ]


class Weights(NamedTuple):
    """Random weights of the size that training starts from."""

    up: Projection
    down: Projection
    gate: Projection | None
    router: Tensor

    def trained(self) -> list[Tensor]:
        """Return the tensors that require gradients."""
        maps = [self.up, self.down, *([self.gate] if self.gate else [])]
        return [tensor for tensor in (self.router, *(t for p in maps for t in p.tensors())) if tensor.requires_grad]


def make_weights(case: Case, generator: torch.Generator, device: str) -> Weights:
    """Return weights with biases where the FFN is plain."""

    def projection(outputs: int, inputs: int) -> Projection:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        bias = None if case.gated else 0.1 * torch.randn(outputs, generator=generator)
        moved = [t.to(device, case.dtype).requires_grad_(case.trained) for t in (weight, bias) if t is not None]
        return Projection(moved[0], None if case.gated else moved[1])

    up, down = projection(case.inner_size, case.hidden_size), projection(case.hidden_size, case.inner_size)
    gate = projection(case.inner_size, case.hidden_size) if case.gated else None
    router = torch.randn(case.num_blocks, case.hidden_size, generator=generator) / case.hidden_size**0.5
    return Weights(up, down, gate, router.to(device).requires_grad_())


def dense(x: Tensor, weights: Weights, case: Case) -> Tensor:
    """Compute the FFN with all its neurons."""
    function, entering = resolve_activation(case.activation), F.linear(x, *weights.up[:2])
    if weights.gate is None:
        return F.linear(function(entering), *weights.down[:2])
    return F.linear(function(F.linear(x, *weights.gate[:2])) * entering, *weights.down[:2])


def routed(x: Tensor, weights: Weights, case: Case, num_active: int, **options: Any) -> Tensor:
    """Route and compute."""
    routing = route(x, weights.router, num_active=num_active)
    maps: dict[str, Any] = {"gate": weights.gate, "activation": case.activation}
    return routed_ffn(x, weights.up, weights.down, routing, **maps, **options)


def step(function: Any, x: Tensor, weights: Weights, grad_output: Tensor) -> list[Tensor]:
    """Return the output and the gradients of one forward and backward pass; the dense FFN has no router."""
    leaf = x.detach().requires_grad_()
    output = function(leaf, weights)
    grads = torch.autograd.grad(output, [leaf, *weights.trained()], grad_output, allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def kept_bytes(function: Any, x: Tensor, weights: Weights) -> int:
    """Return the bytes of distinct storages kept for backward, weights and x left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(leaf, weights)
    maps = [weights.up, weights.down, *([weights.gate] if weights.gate else [])]
    for tensor in (leaf, weights.router, *(t for p in maps for t in p.tensors())):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def measure(case: Case, num_active: int, repeats: int, seed: int, idle_wait_s: float, device: str) -> dict[str, Any]:
    """Verify, then time, one case at one number of active blocks."""
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(case, generator, device)
    x, grad_output = (
        torch.randn(case.num_tokens, case.hidden_size, generator=generator).to(device, case.dtype) for _ in range(2)
    )
    kernels = ("triton", "torch") if device == "cuda" else ("torch",)
    candidates = {name: partial(routed, case=case, num_active=num_active, impl=name) for name in kernels}
    candidates[f"{kernels[0]}, recompute"] = partial(candidates[kernels[0]], recompute=True)
    reference = partial(routed, case=case, num_active=num_active, impl="reference")
    few = slice(0, 256)
    expected = step(reference, x[few], weights, grad_output[few])
    errors = {
        name: require_agreement(
            name, step(function, x[few], weights, grad_output[few]), expected, tolerance=TOLERANCES[case.dtype]
        )
        for name, function in candidates.items()
    }
    candidates = {"dense": partial(dense, case=case), **candidates}
    timed = partial(time_alternating, repeats=repeats, warm_up=1, idle_wait_s=idle_wait_s, device=device)
    with torch.no_grad():
        forward = timed({name: partial(function, x, weights) for name, function in candidates.items()})
    training = timed({name: partial(step, f, x, weights, grad_output) for name, f in candidates.items()})
    return {
        **case._asdict(),
        "dtype": str(case.dtype),
        "active": num_active,
        "share": num_active / case.num_blocks,
        "largest_relative_error": errors,
        "kept_bytes": {name: kept_bytes(function, x, weights) for name, function in candidates.items()},
        "forward": as_dicts(forward),
        "forward_backward": as_dicts(training),
        "speedup_over_dense": {
            direction: {name: timings["dense"].median_ms / timing.median_ms for name, timing in timings.items()}
            for direction, timings in (("forward", forward), ("forward_backward", training))
        },
    }


def run(
    *, repeats: int, idle_wait: float, device: str, only: str, seed: int, quick: bool, progress: Progress
) -> dict[str, Any]:
    """Measure all cases whose name contains ``only``."""
    results = []
    for case in cases(quick, device):
        for num_active in case.active if only in case.name else ():
            results.append(measure(case, num_active, repeats, seed, idle_wait, device))
            speedups = results[-1]["speedup_over_dense"]["forward_backward"]
            shown = ", ".join(f"{name} {speedup:.2f}" for name, speedup in speedups.items())
            progress(f"{case.name}: {num_active} of {case.num_blocks} blocks, times as fast as dense: {shown}")
    return {"results": results}
