"""Tables of inference: throughput and factors, other libraries, exported tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, ratio, table
from sparsepeft_research.results import Result, read_folder, read_result

# Parts of an export's report that tell of a lower precision, and files of a task.
_LOWER = {"int8_tasks": "tasks in int8", "int8": "all in int8", "bfloat16": "in bfloat16"}
_WEIGHTS = {"adapter.onnx_adapter": "bytes for ONNX Runtime", "adapter_model.safetensors": "bytes for PEFT"}
_LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino")


def throughput(results: Path) -> str:
    """Every ``inference*.json``: throughput, factors, tasks in memory."""
    parts = []
    for report in read_folder(results / "benchmarks", "inference*.json").values():
        parts += [
            _heading(report),
            *(table(*plan_table(one)) for one in report.results),
            _factors(report),
            _notes(report),
        ]
    return paragraphs(*parts)


def shares(results: Path) -> str:
    """What the factor over AdapterHub's adapters is made of, task by task; the architecture's share first."""
    report = read_result(results / "benchmarks" / "inference_tasks.json")
    by_task: dict[tuple[str, str], dict[str, float]] = {}
    for factor in report.others["factors"]:
        if "over" in factor:  # products have no ends
            pair = " over ".join(factor[end][0] for end in ("of", "over"))
            by_task.setdefault((factor["factor"], pair), {})[factor["group"]] = factor["value"]
    tasks = report.settings["tasks"]
    rows = [[*key, *(ratio(values.get(task)) for task in tasks)] for key, values in by_task.items()]
    settings = report.settings
    return paragraphs(
        f"{settings['model']}, {report.environment['cpu']}, {settings['threads']} threads, times as fast; texts of the "
        "tasks, padded to 128 tokens or in batches by tokens.",
        table(["factor", "of what over what", *tasks], rows),
    )


def runtimes(results: Path) -> str:
    """The bare backbone in one library after the other."""
    report = read_result(results / "benchmarks" / "runtimes.json")
    rows = []
    for name in report.results[0]["timings"]:
        row = [name]
        for one in report.results:
            speedup = one["speedup_over_torch_float32"][name]
            row += [f"{one['timings'][name]['median_ms']:.1f}", f"{speedup:.2f}", f"{one['deviation'][name]:.1e}"]
        rows.append(row)
    header = [column for one in report.results for column in (f"{one['shape']}, ms", "speed", "deviation")]
    versions = report.environment["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in _LIBRARIES if name in versions)
    return paragraphs(
        f"{report.settings['model']}, {report.environment['cpu']}, {report.settings['threads']} threads; {installed}; "
        "medians of passes that take turns in one process, speed over PyTorch in float32, largest error of the logits "
        "over their largest entry. By `sparsepeft benchmark runtimes`.",
        table(["library", *header], rows),
    )


def exported(results: Path, tasks: str, how: str) -> str:
    """Every ``export_*.json``: scores on whole held-out parts, and how far the float32 model was from PyTorch.

    Args:
        tasks, how: what was exported, and what trained it, for the reader.
    """
    reports = list(read_folder(results, "export_*.json").values())
    return paragraphs(
        f"{reports[0].settings['backbone']} and {tasks}. Largest deviation of the model in float32 (and that of all "
        "but one of 1,000 texts or tokens), its labels, score x 100, how far it and labels move in a lower precision. "
        f"By `sparsepeft export` of tasks that {how} trained.",
        *map(_exported, reports),
    )


def _exported(report: Result) -> str:
    tasks = report.results
    lower = [key for key in _LOWER if all(key in task for task in tasks.values())]
    weights = [name for name in _WEIGHTS if all(name in task["bytes"] for task in tasks.values())]
    rows = []
    for name, task in tasks.items():
        before = 100 * task[lower[0]]["before"]
        usual = f" ({task['usual_deviation']:.1e})" if "usual_deviation" in task else ""
        row = [name, f"{task['num_texts']:,}", f"{task['max_deviation']:.1e}{usual}", str(task["num_other_labels"])]
        row += [task[lower[0]]["metric"], f"{before:.2f}"]
        for key in lower:
            row += [f"{100 * task[key]['after'] - before:+.2f}", str(task[key]["num_other_labels"])]
        rows.append(row + [f"{task['bytes'][weight]:,}" for weight in weights])
    header = [report.settings["format"], "texts", "largest deviation", "other labels", "metric", "PyTorch"]
    header += [column for key in lower for column in (_LOWER[key], "other labels")]
    return table([*header, *(_WEIGHTS[weight] for weight in weights)], rows)


def _heading(report: Result) -> str:
    settings = report.settings
    device = f", emulated {settings['device']}" if settings["device"] else ""
    process = ", in one process" if settings.get("one_process") else ""
    return (
        f"### {report.measured}: {settings['model']}, {settings['workload']}{device}{process}\n\n"
        f"{report.environment['cpu']}, {settings['threads']} threads of each process; medians of alternating passes; "
        f"lengths by the tokenizer of {settings['tokenizer']}; adapters of the paper's sizes. By `sparsepeft benchmark "
        "inference`, see [edge.md](../edge.md)."
    )


def plan_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a plan: speed of each candidate, over those that it is measured against, and memory."""
    candidates = result["candidates"]
    baselines = list(dict.fromkeys(name for one in candidates.values() for name in one["speed_over"]))
    rows = []
    for name, one in candidates.items():
        peak = one["peak_bytes"]
        ratios = [f"{one['speed_over'][other]:.3f}" if other in one["speed_over"] else "1" for other in baselines]
        speed = [f"{one['timing']['median_ms']:.1f}", f"{one['inputs_per_minute']:.1f}"]
        memory = "" if peak is None else f"{peak / 2**20:.0f}"
        rows.append([name, *speed, *ratios, memory, ratio(one.get("share_of_peak"))])
    header = [f"{result['group']}: {result['plan']}", "ms", "inputs per minute", *(f"over {b}" for b in baselines)]
    return [*header, "peak MiB", "of the peak speed"], rows


def loading_note(loading: dict[str, Any]) -> str:
    """What many tasks in one engine take."""
    return (
        f"{loading['num_loaded']} tasks in one engine take {loading['resident_over_files']:.2f} times their "
        f"files. A call for another task than before takes {loading['switch_ms']:.2f} ms more; a task that has "
        f"been read is in another's place after {loading['swap_ms']:.2f} ms, with reading "
        f"{loading['replace_ms']:.1f} ms."
    )


def _factors(report: Result) -> str:
    rows = [
        [one["factor"], one["group"], *(", ".join(one.get(end, ())) for end in ("of", "over")), f"{one['value']:.3f}"]
        for one in report.others["factors"]
    ]
    return table(["factor", "group", "of", "over", "value"], rows) if rows else ""


def _notes(report: Result) -> str:
    lines = [f"- {name} was left out: {reason}." for name, reason in report.others["left_out"].items()]
    if loading := report.others["loading"]:
        lines.append(f"- {loading_note(loading)}")
    return "\n".join(lines)
