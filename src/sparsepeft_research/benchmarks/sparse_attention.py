"""Speed and memory of sparse_attention against SDPA, over the number of tokens.

    sparsepeft benchmark sparse_attention --output sparse_attention.json
    sparsepeft benchmark sparse_attention --device cuda --output sparse_attention_gpu.json

On a CPU the compiled kernels in float32, on a GPU Triton (tokens) and FlexAttention (blocks) in bfloat16. Every
implementation is first compared with the reference. Times are of one call forward, and forward with backward to query,
key and value, encoding and selection included; these two are also timed by themselves. Memory is what a forward and
backward pass allocates beyond its inputs, at its peak, as counted by torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops import fit_codebooks, selection_recall, sparse_attention
from sparsepeft.ops.sparse_attention import encode
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.cpu import cpu_select
from sparsepeft.ops.sparse_attention.similarity import Codes
from sparsepeft_research.benchmarks.measuring import (
    as_dicts,
    forward_backward,
    peak_bytes,
    require_agreement,
    time_alternating,
)
from sparsepeft_research.benchmarks.registry import Progress

Attention = Callable[..., Tensor]
# Float32 rounding; a wrongly kept key would show as 1e-2 or more.
TOLERANCE = 1e-4
# A few roundings of bfloat16 (4e-3).
HALF_TOLERANCE = 3e-2
FORMS: dict[str, dict[str, Any]] = {
    "token": {"granularity": "token"},
    "block": {"granularity": "block"},
    "token, matches": {"granularity": "token", "similarity": "matches"},
    "block, matches": {"granularity": "block", "similarity": "matches"},
}
IMPLS = {"cpu": {"token": "cpu", "block": "cpu"}, "cuda": {"token": "triton", "block": "flex"}}
# The reference holds (heads, n, n): it is compared on so many of the first tokens.
VERIFIED_TOKENS = 512


class Case(NamedTuple):
    """One attention layer of one sequence."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    top_l: int
    causal: bool


def cases(quick: bool, device: str) -> list[Case]:
    """Return the cases; the quick one only shows that the script works."""
    if quick:
        return [Case(256, 2, 1, 32, 32, True)]
    if device == "cuda":
        eighth = [Case(n, 16, 16, 64, n // 8, causal) for n in (2048, 4096, 8192, 16384) for causal in (False, True)]
        fixed = [Case(n, 16, 16, 64, 512, True) for n in (8192, 16384)]
        return [*eighth, *fixed, Case(4096, 16, 4, 64, 512, True), Case(8192, 8, 8, 128, 1024, True)]
    eighth = [Case(n, 16, 16, 64, n // 8, causal) for n in (1024, 2048, 4096, 8192) for causal in (False, True)]
    fixed = [Case(n, 16, 16, 64, 512, True) for n in (1024, 2048, 8192, 16384)]
    return [*eighth, *fixed, Case(4096, 16, 4, 64, 512, True), Case(4096, 8, 8, 128, 512, True)]


def candidates(case: Case, codebooks: Tensor) -> dict[str, Attention]:
    """Return what is compared, by name."""
    sparse = {
        name: partial(
            sparse_attention,
            codebooks=codebooks,
            top_l=case.top_l,
            causal=case.causal,
            impl=IMPLS[codebooks.device.type][how["granularity"]],
            **how,
        )
        for name, how in FORMS.items()
    }
    return {"sdpa": partial(F.scaled_dot_product_attention, is_causal=case.causal, enable_gqa=True), **sparse}


def verify(case: Case, tensors: list[Tensor], grad_output: Tensor, codebooks: Tensor) -> dict[str, float]:
    """Compare each form with the reference, in outputs and gradients; its numbers are float32.

    What keys are chosen by is rounded to eighths: sums of products are exact, and no key is chosen by their rounding.
    """
    dtype = tensors[0].dtype
    few = [tensor[:, :, :VERIFIED_TOKENS].contiguous() for tensor in (*tensors, grad_output)]
    few[:2], codebooks = [(tensor * 8).round() / 8 for tensor in few[:2]], (codebooks * 8).round() / 8
    exact = [tensor.float() for tensor in few]
    top_l = max(1, case.top_l * few[0].shape[2] // case.num_tokens)
    attentions: dict[str, Any] = candidates(case._replace(top_l=top_l), codebooks)
    errors = {}
    for name in FORMS:
        expected = forward_backward(partial(attentions[name], impl="reference"), exact[:3], exact[3])
        actual = [t.float() for t in forward_backward(attentions[name], few[:3], few[3])]
        tolerance = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
        errors[name] = require_agreement(name, actual, expected, tolerance=tolerance)
    return errors


def parts(case: Case, tensors: list[Tensor], codebooks: Tensor) -> dict[str, Callable[[], object]]:
    """Return what can be timed by itself: codes, and selection alone."""
    query, key, _ = tensors
    none = {"window": None, "query_positions": None, "key_mask": None}
    visibility = Visibility.of(1, case.num_tokens, case.num_tokens, causal=case.causal, device=query.device, **none)
    settings = Settings(True, case.top_l, 1.0, 0.0, True, True, 0)
    codes = Codes(encode(key, codebooks), None, codebooks)
    common = {"encode": lambda: encode(key, codebooks)}
    if query.is_cuda:
        from sparsepeft.ops.sparse_attention.triton import select_triton

        return {
            **common,
            "encode and token selection": lambda: select_triton(query, key, codebooks, None, visibility, settings),
        }
    return {**common, "token selection": lambda: cpu_select(query, codes, visibility, settings)}


def measure(case: Case, repeats: int, seed: int, idle_wait_s: float, device: str) -> dict[str, Any]:
    """Verify, then time, one case."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, case.num_tokens, case.head_size, generator=generator).to(device, dtype)

    tensors = [normal(case.num_heads), normal(case.num_kv_heads), normal(case.num_kv_heads)]
    grad_output = normal(case.num_heads)
    codebooks = fit_codebooks(tensors[1][0, :, :2048], num_iterations=5, seed=seed)
    errors = verify(case, tensors, grad_output, codebooks)

    attentions = candidates(case, codebooks)
    timed = partial(time_alternating, repeats=repeats, warm_up=1, idle_wait_s=idle_wait_s, device=device)
    with torch.no_grad():
        forward = timed({name: partial(attend, *tensors) for name, attend in attentions.items()})
        alone = timed(parts(case, tensors, codebooks))
    training = {name: partial(forward_backward, attend, tensors, grad_output) for name, attend in attentions.items()}
    both = timed(training)
    peaks = {name: peak_bytes(step, device) for name, step in training.items()}
    query, key = (tensor[:, :, :2048] for tensor in tensors[:2])
    recall = selection_recall(query, key, codebooks, top_l=min(case.top_l, 256), causal=case.causal)
    return {
        **case._asdict(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "largest_relative_error": errors,
        "forward": as_dicts(forward),
        "forward_backward": as_dicts(both),
        "parts_of_forward": as_dicts(alone),
        "peak_mib": {name: size / 2**20 for name, size in peaks.items()},
        "speedup_over_sdpa": {name: both["sdpa"].median_ms / both[name].median_ms for name in FORMS},
        "memory_of_sdpa": {name: peaks[name] / peaks["sdpa"] for name in FORMS},
        # Of random vectors, the hardest there are: the figure to report is that of a real model.
        "recall_on_random_vectors": recall,
    }


def run(*, repeats: int, idle_wait: float, device: str, seed: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure all cases."""
    results = []
    for case in cases(quick, device):
        results.append(measure(case, repeats, seed, idle_wait, device))
        times = [
            f"{part} ms: "
            + ", ".join(f"{name} {timing['median_ms']:.3g}" for name, timing in results[-1][part].items())
            for part in ("forward_backward", "parts_of_forward")
        ]
        progress(f"{case}: {'; '.join(times)}")
    return {"results": results}
