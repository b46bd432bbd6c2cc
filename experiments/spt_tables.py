"""The results page's sections on SPT: what sparsity costs in quality, and what it saves of a fine-tuning step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _markdown import table

Runs = dict[str, dict[int, dict[str, Any]]]  # by setting, then seed
_BASE = "both"
_MATCHING = "token selection and attention over vectors of 1"


def quality(folder: Path) -> str:
    """All kinds of runs of ``spt_quality.py`` that have files."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["experiment"]["kind"], []).append(result)
    makers: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
        "lm": _language_model,
        "encoder": _encoders,
        "conversion": _conversions,
    }
    parts = [part for kind, make in makers.items() if kind in kinds for part in make(kinds[kind])]
    if not parts:
        return ""
    command = "By `python experiments/spt_quality.py --data-dir DATA --model LLAMA`."
    return "\n\n".join(["## What sparsity (SPT) costs in quality", command, *parts])


def stack(reports: list[dict[str, Any]], machine: str) -> str:
    """Time and memory of a fine-tuning step, from ``bench_spt_stack.py``, lengths in files of their own."""
    settings = reports[0]["settings"]
    parts = [
        "## A fine-tuning step with SPT",
        f"{settings['layers']} layers of {settings['model']} (random weights, no language-modelling head), LoRA on "
        f"queries and values, batch {settings['batch_size']}, {settings['dtype']}, L = {settings['top_l']:g} of the "
        f"length by {settings['granularity']}; {machine}; medians of alternating steps. Peak is what a step allocates "
        "above weights and optimizer state. By `python benchmarks/bench_spt_stack.py`.",
    ]
    for result in (result for report in reports for result in report["results"]):
        rows = [
            [
                name,
                f"{found['step']['median_ms']:.0f}",
                _shown(found["speedup_over"].get("sdpa")),
                f"{found['peak_bytes'] / 2**20:.0f}",
                _shown(found["peak_of"].get("sdpa")),
                _shown(found["peak_of"].get("eager")),
            ]
            for name, found in result["candidates"].items()
        ]
        header = [f"{result['length']} tokens", "ms", "speed-up", "peak MiB", "of SDPA's", "of eager's"]
        parts.append(table(header, rows))
        parts += [f"{name} was left out: {reason}." for name, reason in result["left_out"].items()]
    return "\n\n".join(parts)


def attention(report: dict[str, Any], machine: str) -> str:
    """Time and memory of the op by itself, from ``bench_sparse_attention.py``."""
    rows = []
    for result in sorted(report["results"], key=lambda one: (one["num_tokens"], one["top_l"], one["causal"])):
        heads = f"{result['num_heads']} of {result['head_size']}"
        if result["num_kv_heads"] != result["num_heads"]:
            heads += f", {result['num_kv_heads']} of keys"
        times = result["forward_backward"]
        rows.append(
            [
                f"{result['num_tokens']:,}",
                f"{result['top_l']:,}",
                heads,
                "causal" if result["causal"] else "all",
                *(f"{times[name]['median_ms']:.0f}" for name in ("sdpa", "token", "block")),
                *(_shown(result["speedup_over_sdpa"][name]) for name in ("token", "block")),
                *(_shown(result["memory_of_sdpa"][name]) for name in ("token", "block")),
                f"{result['parts_of_forward'][_MATCHING]['median_ms']:.0f}",
            ]
        )
    header = ["n", "L", "heads", "keys", "SDPA", "token", "block"]
    header += ["token speed-up", "block speed-up", "token memory", "block memory", "matching"]
    return "\n\n".join(
        [
            "## Sparse attention alone",
            f"Milliseconds forward and backward, encoding and selection included, {report['results'][0]['dtype']}; "
            f"{machine}. Speed-up over SDPA, memory as a share of SDPA's. `matching` is the token form forward over "
            "vectors of one number: comparing codes and choosing keys, the part that grows with the square of n; "
            "backward does it again. By `python benchmarks/bench_sparse_attention.py`.",
            table(header, rows),
        ]
    )


def feed_forward(report: dict[str, Any], machine: str) -> str:
    """Time and memory of the routed FFN by itself, from ``bench_routed_ffn.py``."""
    rows = []
    for result in report["results"]:
        speedups, kept = result["speedup_over_dense"], result["kept_bytes"]
        best = max((name for name in kept if name != "dense"), key=speedups["forward_backward"].__getitem__)
        rows.append(
            [
                result["name"],
                f"{result['num_tokens']:,}",
                f"{result['hidden_size']:,} x {result['inner_size']:,}",
                f"{result['active']} of {result['num_blocks']}",
                f"{result['forward_backward']['dense']['median_ms']:.1f}",
                best,
                *(_shown(speedups[direction][best]) for direction in ("forward", "forward_backward")),
                _shown(kept[best] / kept["dense"]),
            ]
        )
    header = ["FFN", "tokens", "sizes", "blocks", "dense, ms", "fastest", "forward", "with backward", "kept memory"]
    return "\n\n".join(
        [
            "## Routed FFN alone",
            f"{machine}; frozen weights where not said, medians of alternating calls, each kernel checked against the "
            "reference first. The dense FFN's time forward and backward; of the fastest kernel, speed-ups over it and "
            "what it keeps for backward as a share of what the dense one keeps. By `python "
            "benchmarks/bench_routed_ffn.py`.",
            table(header, rows),
        ]
    )


def _language_model(results: list[dict[str, Any]]) -> list[str]:
    runs = _by_setting(results)
    rows = []
    for setting, by_seed in _base_first(runs):
        found = list(by_seed.values())
        converted = [result["before"]["sparse"]["perplexity"] for result in found if "sparse" in result["before"]]
        spt = found[0]["spt"]
        rows.append(
            [
                setting,
                str(spt["config"]["top_l"]) if spt and spt["config"]["attention"] else "",
                str(len(found)),
                _spread([result["before"]["dense"]["perplexity"] for result in found]),
                _spread(converted),
                _spread([result["score"] for result in found]),
                _change(by_seed, runs.get("dense", {})),
            ]
        )
    first = results[0]
    return [
        f"A Llama ({first['model']}) fine-tuned on BBC News with LoRA, {_steps(results)} steps, blocks of "
        f"{first['block_length']} tokens: perplexity on {first['num_validation_tokens']:,} tokens of held-out "
        "articles, mean and standard deviation over seeds. `both` is L = n/8 by token and half of 8 clustered blocks; "
        "the others differ in what their names say. The change is against LoRA on the dense model, seed by seed.",
        table(["setting", "L", "seeds", "dense, before", "sparse, before", "fine-tuned", "change"], rows),
    ]


def _encoders(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for task in sorted({result["task"] for result in results}):
        runs = _by_setting([result for result in results if result["task"] == task])
        for setting, by_seed in _base_first(runs):
            found = list(by_seed.values())
            configs = [result["spt"]["config"] for result in found if "spt" in result]
            lengths = sorted({config["top_l"] for config in configs if config["attention"]})
            rows.append(
                [
                    f"{task}, {setting}",
                    ", ".join(map(str, lengths)),
                    str(len(found)),
                    _spread([100 * result["score"] for result in found]),
                    _change(by_seed, runs.get("dense", {})),
                ]
            )
    return [
        f"MiniLM, LoRA, {results[0]['num_train']} training examples, {_steps(results)} steps: the task's main metric x "
        "100 on the validation set. L is a quarter of the longest text of the calibration batch, so it differs by "
        "seed.",
        table(["task, setting", "L", "seeds", "score", "change"], rows),
    ]


def _conversions(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        dense, sparse = (result["before"][kind]["perplexity"] for kind in ("dense", "sparse"))
        report = result["spt"]["report"]
        errors = list(report["feed_forward_error"].values()) or list(report["attention_error"].values())
        rows.append(
            [
                result["experiment"]["setting"],
                f"{sparse:.1f}",
                f"{100 * (sparse / dense - 1):+.1f} %",
                f"{statistics.mean(errors):.3f}" if errors else "",
                f"{statistics.mean(report['recall'].values()):.3f}" if report["recall"] else "",
            ]
        )
    return [
        f"Right after conversion, nothing trained: perplexity on {results[0]['num_validation_tokens']:,} tokens of "
        f"WikiText-2's test part, where the dense model's is {results[0]['before']['dense']['perplexity']:.1f}. "
        "Names of FFNs: what blocks and routers are made from (`activity` of a calibration batch or the `weights`; "
        "`contiguous` blocks or clusters; `compensated` with a linear map of rank 32 in the place of the blocks that "
        "are not used), and blocks in use of 8. Of attention: granularity, and L over n.",
        table(["setting", "perplexity", "change", "mean error of a layer", "recall"], rows),
    ]


def _by_setting(results: list[dict[str, Any]]) -> Runs:
    found: Runs = {}
    for result in results:
        found.setdefault(result["experiment"]["setting"], {})[result["seed"]] = result
    return found


def _base_first(runs: Runs) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    order = ["dense", _BASE, "attention", "ffn"]
    return sorted(runs.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))


def _change(by_seed: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> str:
    """Of the score, in per cent of the dense model's with the same seed."""
    both = by_seed.keys() & dense.keys()
    if not both or by_seed is dense:
        return ""
    return _spread([100 * (by_seed[seed]["score"] / dense[seed]["score"] - 1) for seed in both], sign="+") + " %"


def _spread(values: list[float], sign: str = "") -> str:
    """Mean, and standard deviation of the sample where there is one."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _steps(results: list[dict[str, Any]]) -> str:
    return " or ".join(str(steps) for steps in sorted({result["steps"] for result in results}))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
