"""Tables of ops by themselves, of processors and of the allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, ratio, table
from sparsepeft_research.results import Result, read_folder, read_result

_FORMS = ("token", "block")
_SELECTION, _MATCHING = "token selection", "token selection and attention over vectors of 1"


def memory(results: Path) -> str:
    """``memory_read``, forward."""
    report = read_result(results / "benchmarks" / "memory.json")
    rows = []
    for one in report.results:
        shape = [f"{one[key]:,}" for key in ("num_tokens", "num_parents", "num_children", "top_k")]
        times = [
            f"{one['forward'][form]['median_ms']:.1f}" if form in one["forward"] else ""
            for form in ("gather", "masked", "selected", "auto")
        ]
        rows.append([*shape, *times, one["chosen"]])
    return paragraphs(
        f"Forward, milliseconds, D=768, float32, {report.machine}; medians of alternating calls, each form checked "
        "against the reference first. `gather` is what one writes first in plain PyTorch. By `sparsepeft benchmark "
        "memory`.",
        table(["tokens", "P", "C", "K", "gather", "masked", "selected", "auto", "auto is"], rows),
        *report.others.get("notes", []),
    )


def large_memory(results: Path) -> str:
    """Memories of up to 65,536 parents: a token's share of a pass, by way and number of parents."""
    report = read_result(results / "benchmarks" / "large_memory.json")
    ways = ("forward", "forward_backward", "step")
    rows = []
    for one in report.results:
        times, over = one["microseconds_per_token"], one["over_flat_256"]
        cells = [f"{times[way]:.1f} ({over[way]:.2f})" if way in times else "" for way in ways]
        rows.append([one["kind"], f"{one['parents']:,}", *cells])
    first = report.results[0]
    return paragraphs(
        f"Microseconds a token, {first['num_tokens']:,} tokens, D={first['hidden_size']}, C={first['num_children']}, "
        f"K={first['top_k']}, float32, {report.machine}; in brackets the multiple of a flat memory's of 256 parents. "
        "`step` has the optimizer's, of the cells that were read. By `sparsepeft benchmark large_memory`.",
        table(["keys", "P", "forward", "forward and backward", "step"], rows),
    )


def attention(results: Path) -> str:
    """Time and memory of sparse attention: keys by inner products, and by matches, which alone older files have."""
    report = read_result(results / "benchmarks" / "sparse_attention.json")
    matches = tuple(f"{name}, matches" for name in _FORMS if _has_similarities(report))
    rows = []
    for one in sorted(report.results, key=lambda one: (one["num_tokens"], one["top_l"], one["causal"])):
        heads = f"{one['num_heads']} of {one['head_size']}"
        if one["num_kv_heads"] != one["num_heads"]:
            heads += f", {one['num_kv_heads']} of keys"
        shape = [f"{one['num_tokens']:,}", f"{one['top_l']:,}", heads, "causal" if one["causal"] else "all"]
        times = [f"{one['forward_backward'][name]['median_ms']:.0f}" for name in ("sdpa", *_FORMS)]
        ratios = [ratio(one["speedup_over_sdpa"][name]) for name in (*_FORMS, *matches)]
        ratios += [ratio(one["memory_of_sdpa"][name]) for name in _FORMS]
        selection = one["parts_of_forward"][_SELECTION if matches else _MATCHING]
        rows.append([*shape, *times, *ratios, f"{selection['median_ms']:.0f}"])
    header = ["n", "L", "heads", "keys", "SDPA", *_FORMS, *(f"{name} speed-up" for name in (*_FORMS, *matches))]
    if matches:
        about = "Keys by inner products where not said. `selection` is choosing keys by token, once, from their codes."
    else:
        about = (
            "Keys by matches. `selection` is the token form forward over vectors of one number: comparing codes and "
            "choosing keys, the part that grows with the square of n; backward does it again."
        )
    return paragraphs(
        f"Milliseconds forward and backward, encoding and selection included, {report.results[0]['dtype']}; "
        f"{report.machine}. Speed-up over SDPA, memory as a share of SDPA's. {about} By `sparsepeft benchmark "
        "sparse_attention`.",
        table([*header, *(f"{name} memory" for name in _FORMS), "selection"], rows),
    )


def _has_similarities(report: Result) -> bool:
    """Whether a file has both ways to choose keys, inner products and matches; an older one has matches alone."""
    return "token, matches" in report.results[0]["forward_backward"]


def feed_forward(results: Path) -> str:
    """Time and memory of the routed FFN."""
    report = read_result(results / "benchmarks" / "routed_ffn.json")
    rows = []
    for one in report.results:
        speedups, kept = one["speedup_over_dense"], one["kept_bytes"]
        best = max((name for name in kept if name != "dense"), key=speedups["forward_backward"].__getitem__)
        rows.append(
            [
                one["name"],
                f"{one['num_tokens']:,}",
                f"{one['hidden_size']:,} x {one['inner_size']:,}",
                f"{one['active']} of {one['num_blocks']}",
                f"{one['forward_backward']['dense']['median_ms']:.1f}",
                best,
                *(ratio(speedups[direction][best]) for direction in ("forward", "forward_backward")),
                ratio(kept[best] / kept["dense"]),
            ]
        )
    header = ["FFN", "tokens", "sizes", "blocks", "dense, ms", "fastest", "forward", "with backward", "kept memory"]
    return paragraphs(
        f"{report.machine}; frozen weights where not said, medians of alternating calls, each kernel checked against "
        "the reference first. The dense FFN's time forward and backward; of the fastest kernel, speed-ups over it and "
        "what it keeps for backward as a share of what the dense one keeps. By `sparsepeft benchmark routed_ffn`.",
        table(header, rows),
    )


def gpu(results: Path) -> str:
    """What the ops take on a GPU, forward and backward, beside what they replace."""
    folder = results / "benchmarks"
    memory, attention, ffn = (
        read_result(folder / f"{name}_gpu.json") for name in ("memory", "sparse_attention", "routed_ffn")
    )

    def row(op: str, case: str, one: dict[str, Any], dense: str, ours: str) -> list[str]:
        times = [one["forward_backward"][form]["median_ms"] for form in (dense, ours)]
        return [op, case, dense, *(f"{time:.2f}" for time in times), ratio(times[0] / times[1])]

    rows = [
        row("`memory_read`", f"{one['num_tokens']:,} tokens, P=16, C=3", one, "masked", "triton")
        for one in memory.results
        if one["num_parents"] == 16 and one["num_children"] == 3
    ]
    for one in attention.results:
        case = f"{one['num_tokens']:,} tokens, L={one['top_l']:,}{', causal' if one['causal'] else ''}"
        if one["num_heads"] == one["num_kv_heads"] == 16:
            rows += [row(f"`sparse_attention`, by {form}", case, one, "sdpa", form) for form in ("token", "block")]
    rows += [
        row("`routed_ffn`", f"{one['name']}, {one['active']} of {one['num_blocks']} blocks", one, "dense", "triton")
        for one in ffn.results
    ]
    similarity = "inner products" if _has_similarities(attention) else "matches"
    return paragraphs(
        f"{memory.environment['gpu']}, bfloat16, milliseconds forward and backward; speed is that of the op over what "
        f"it replaces (for `memory_read`, dense products in plain PyTorch). Attention chooses keys by {similarity}. By "
        "`research/gpu.sh`.",
        table(["op", "case", "replaces", "ms", "op, ms", "speed"], rows),
    )


def processors(results: Path) -> str:
    """What the kernels give on each kind of processor, beside what was aimed at."""
    reports = read_folder(results / "benchmarks", "processors_*.json").values()
    kinds = [f"{report.environment['vectors']} ({report.settings['processor']})" for report in reports]
    judged = zip(*(report.results["against_targets"] for report in reports), strict=True)
    rows = [[e[0]["figure"], " ".join(map(str, e[0]["aim"])), *(f"{x['measured']:.2f}" for x in e)] for e in judged]
    machines = "; ".join(f"{kind}: {report.machine}" for kind, report in zip(kinds, reports, strict=True))
    return paragraphs(
        "Float32; medians, one run each. avx2 keeps the kernels, PyTorch, MKL and oneDNN to what a processor without "
        f"AVX-512 has. {machines}. By `sparsepeft benchmark processors`.",
        table(["figure", "aim", *kinds], rows),
    )


def allocator(results: Path) -> str:
    """What reusing freed memory gives."""
    report = read_result(results / "benchmarks" / "allocator.json")
    rows = []
    for one in report.results:
        timings = [f"{one['timings'][form]['median_ms']:.0f}" for form in ("as it is", "kept")]
        model = " ".join(filter(None, (one["model"], one["method"])))
        ratios = [ratio(one[name]) for name in ("speedup", "peak_ratio")]
        rows.append([one["kind"], model, one["precision"], " x ".join(map(str, one["shape"])), *timings, *ratios])
    return paragraphs(
        "`sparsepeft.devices.keep_freed_memory` against glibc's allocator as it is: milliseconds of a pass "
        f"(training: forward and backward), medians over passes of two processes that take turns; {report.machine}. By "
        "`sparsepeft benchmark allocator`.",
        table(["kind", "model", "precision", "shape", "as it is", "kept", "speed", "peak memory"], rows),
    )
