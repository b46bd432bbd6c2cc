"""Tables of fine-tuning: its throughput, how near our adapters are to AdapterHub's, and what killed runs come to."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.results import read_result

_STEPS = "steps, "
_BASELINES = ("spartan", "adapters pfeiffer", "adapters pfeiffer, padded to 128")


def throughput(results: Path) -> str:
    """Steps per minute of every method and option."""
    report = read_result(results / "benchmarks" / "finetuning.json")
    settings = report.settings
    parts = [
        f"{settings['model']}, {settings['num_examples']} examples of {settings['task']}, batches of "
        f"{settings['batch_size']}, float32 where nothing else is said; {report.machine}; medians of alternating "
        "epochs in one run. Ours are whole training runs with batches by length, `adapters` a bare loop with batches "
        "in random order. By `sparsepeft benchmark finetuning --data-dir DATA`."
    ]
    for group, candidates in report.results.items():
        parts.append(_speeds(group, candidates))
        parts += [f"{name}: {one['failed']}" for name, one in candidates.items() if "failed" in one]
    return paragraphs(*parts)


def bare_steps(results: Path) -> str:
    """Training steps of equal batches, against AdapterHub's."""
    report = read_result(results / "benchmarks" / "finetuning_steps.json")
    failed = [
        f"{name}: {one['failed']}" for each in report.results.values() for name, one in each.items() if "failed" in one
    ]
    return paragraphs(
        "Bare training steps of equal batches (tokens without padding) in the same loop on both sides: how many times "
        "as fast SPARTAN is, memories alone, as each of the others. bf16 is autocast. "
        f"{report.machine}; medians of alternating steps in one run. By `sparsepeft benchmark finetuning "
        "--data-dir DATA --groups steps --model ,MPNET`.",
        steps(report.results),
        *failed,
    )


def _speeds(group: str, candidates: dict[str, Any]) -> str:
    speeds = {name: one["steps_per_minute"] for name, one in candidates.items() if "steps_per_minute" in one}
    baselines = [name for name in _BASELINES if name in speeds]
    rows = [
        [
            name,
            f"{speed:.0f}",
            f"{candidates[name]['preparation_s']:.1f}",
            *(f"{speed / speeds[baseline]:.2f}" for baseline in baselines),
        ]
        for name, speed in speeds.items()
    ]
    return table([group, "steps per minute", "preparation (s)", *(f"over {b}" for b in baselines)], rows)


def steps(sets: dict[str, Any]) -> str:
    """How fast SPARTAN's bare steps are against every other candidate, a row for each backbone and batch."""
    ratios: dict[str, dict[str, float]] = {}
    for title, candidates in sets.items():
        case = title.removeprefix(_STEPS).rpartition(", ")[0]
        speeds = {name: one["steps_per_minute"] for name, one in candidates.items() if "steps_per_minute" in one}
        spartan = speeds.pop("spartan", None)
        found = {name: spartan / speed for name, speed in speeds.items()} if spartan else {}
        ratios[case] = found | ratios.get(case, {})  # a candidate of several sets by the first, that of all methods
    names = list(dict.fromkeys(name for found in ratios.values() for name in found))
    rows = [[case, *(f"{found[n]:.2f}" if n in found else "" for n in names)] for case, found in ratios.items()]
    return table(["SPARTAN over", *(name.removeprefix("spartan, ") for name in names)], rows)


def adapterhub(results: Path) -> str:
    """How far our bottleneck adapters are from AdapterHub's."""
    cases = read_result(results / "benchmarks" / "adapters_equality.json").results
    errors: dict[tuple[str, str, str], float] = {}
    for case in cases:
        for mode, by_kind in case["largest_errors"].items():
            key = (case["model_type"], case["style"], mode.partition("_")[0])
            errors[key] = max(errors.get(key, 0.0), *by_kind.values())
    rows = [[f"{model}, {style}", dtype, f"{error:.1e}"] for (model, style, dtype), error in sorted(errors.items())]
    return paragraphs(
        f"Largest difference of hidden states, logits and all gradients over {len(cases)} configurations with the same "
        "random weights, in eval and training mode, also with the adapter imported from a checkpoint that AdapterHub's "
        "library wrote. By `sparsepeft benchmark adapters`.",
        table(["backbone and style", "dtype", "largest error"], rows),
    )


def crashes(results: Path) -> str:
    """Trainings that were killed and went on, by setting."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, run in itertools.chain.from_iterable(
        part.items() for part in read_result(results / "crashes.json").results.values()
    ):
        runs.setdefault(name.rpartition("-")[0], []).append(run)
    rows = [
        [name, str(len(each)), str(sum(len(run["kills"]) for run in each)), str(sum(run["survived"] for run in each))]
        for name, each in runs.items()
    ]
    return table(["training", "runs", "kills", "ended alike"], rows)
