"""The results page's section on inference, from files of ``sparsepeft benchmark inference``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _markdown import table

# Parts of an export's report that tell of a lower precision, and files of a task.
_LOWER = {"int8_tasks": "tasks in int8", "int8": "all in int8", "bfloat16": "in bfloat16"}
_WEIGHTS = {"adapter.onnx_adapter": "bytes for ONNX Runtime", "adapter_model.safetensors": "bytes for PEFT"}
_LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino")


def inference(folder: Path) -> str:
    """Every ``inference*.json``: throughput, factors, tasks in memory."""
    parts = []
    for file in sorted(folder.glob("inference*.json")):
        report = json.loads(file.read_text())
        parts += [_about(report), *map(_result, report["results"]), _factors(report), *_rest(report)]
    return "\n\n".join(["## Inference", *(part for part in parts if part)]) if parts else ""


def runtimes(file: Path) -> str:
    """The bare backbone in one library after the other."""
    if not file.exists():
        return ""
    report = json.loads(file.read_text())
    found, results = report["environment"], report["results"]
    rows = []
    for name in results[0]["timings"]:
        row = [name]
        for result in results:
            speedup = result["speedup_over_torch_float32"][name]
            row += [f"{result['timings'][name]['median_ms']:.1f}", f"{speedup:.2f}", f"{result['deviation'][name]:.1e}"]
        rows.append(row)
    header = [column for result in results for column in (f"{result['shape']}, ms", "speed", "deviation")]
    installed = [f"{name} {found['versions'][name]}" for name in _LIBRARIES if name in found["versions"]]
    return "\n\n".join(
        [
            "## The bare backbone in other libraries",
            f"{report['model']}, {found['cpu']}, {report['threads']} threads; {', '.join(installed)}; medians of "
            "passes that take turns in one process, speed over PyTorch in float32, largest error of the logits over "
            "their largest entry. By `python benchmarks/bench_runtimes.py`.",
            table(["library", *header], rows),
        ]
    )


def exported(folder: Path) -> str:
    """Every ``export_*.json``: scores on whole validation sets, and how far the float32 model was from PyTorch."""
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("export_*.json"))]
    if not reports:
        return ""
    return "\n\n".join(
        [
            "## Exported tasks",
            f"{reports[0]['backbone']} and tasks of the tables on all data (task, method, seed) on their whole "
            "validation sets. Deviation and labels of the model in float32, score x 100, how far it and labels "
            "move in a lower precision. By `sparsepeft export` of tasks that `sparsepeft reproduce table1 "
            "--keep-weights` trained.",
            *map(_exported, reports),
        ]
    )


def _exported(report: dict[str, Any]) -> str:
    lower = [key for key in _LOWER if all(key in task for task in report["tasks"].values())]
    weights = [name for name in _WEIGHTS if all(name in task["bytes"] for task in report["tasks"].values())]
    rows = []
    for name, task in report["tasks"].items():
        before = 100 * task[lower[0]]["before"]
        row = [name, f"{task['num_texts']:,}", f"{task['max_deviation']:.1e}", str(task["num_other_labels"])]
        row += [task[lower[0]]["metric"], f"{before:.2f}"]
        for key in lower:
            row += [f"{100 * task[key]['after'] - before:+.2f}", str(task[key]["num_other_labels"])]
        rows.append(row + [f"{task['bytes'][weight]:,}" for weight in weights])
    header = [report["format"], "texts", "largest deviation", "other labels", "metric", "PyTorch"]
    header += [column for key in lower for column in (_LOWER[key], "other labels")]
    return table([*header, *(_WEIGHTS[weight] for weight in weights)], rows)


def _about(report: dict[str, Any]) -> str:
    settings, found = report["settings"], report["environment"]
    device = f" as a {settings['device']}" if settings["device"] else ""
    return (
        f"### {settings['model']}, {settings['workload']}{device}\n\n{found['cpu']}, {settings['threads']} threads of "
        f"each process; medians of alternating passes; lengths by the tokenizer of {settings['tokenizer']}; adapters "
        "of the paper's sizes. By `sparsepeft benchmark inference`, see [edge.md](edge.md)."
    )


def _result(result: dict[str, Any]) -> str:
    baselines = list(dict.fromkeys(name for one in result["candidates"].values() for name in one["speed_over"]))
    header = [
        f"{result['group']}: {result['plan']}",
        "ms",
        "inputs per minute",
        *(f"over {name}" for name in baselines),
    ]
    header += ["peak MiB", "of the peak speed"]
    rows = []
    for name, one in result["candidates"].items():
        share, peak = one.get("share_of_peak"), one["peak_bytes"]
        ratios = [f"{one['speed_over'][other]:.3f}" if other in one["speed_over"] else "1" for other in baselines]
        figures = [f"{one['timing']['median_ms']:.1f}", f"{one['inputs_per_minute']:.1f}", *ratios]
        memory = "" if peak is None else f"{peak / 2**20:.0f}"
        rows.append([name, *figures, memory, "" if share is None else f"{share:.2f}"])
    return table(header, rows)


def _factors(report: dict[str, Any]) -> str:
    rows = [
        [one["factor"], one["group"], *(", ".join(one.get(end, ())) for end in ("of", "over")), f"{one['value']:.3f}"]
        for one in report["factors"]
    ]
    return table(["factor", "group", "of", "over", "value"], rows) if rows else ""


def _rest(report: dict[str, Any]) -> list[str]:
    lines = [f"- {name} was left out: {reason}." for name, reason in report["left_out"].items()]
    loading = report["loading"]
    if loading:
        lines.append(
            f"- {loading['num_loaded']} tasks in one engine take {loading['resident_over_files']:.2f} times their "
            f"files. A call for another task than before takes {loading['switch_ms']:.2f} ms more; a task that has "
            f"been read is in another's place after {loading['swap_ms']:.2f} ms, with reading "
            f"{loading['replace_ms']:.1f} ms."
        )
    return ["\n".join(lines)] if lines else []
