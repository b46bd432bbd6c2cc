"""The results page's section on inference, from files of ``sparsepeft benchmark inference``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _markdown import table

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


def exported(file: Path) -> str:
    """An int8 export's scores on whole validation sets, and how far its float32 graph was from PyTorch."""
    if not file.exists():
        return ""
    report = json.loads(file.read_text())
    rows = []
    for name, task in report["tasks"].items():
        tasks_only, int8 = task["int8_tasks"], task["int8"]
        before, alone, after = 100 * int8["before"], 100 * tasks_only["after"], 100 * int8["after"]
        sizes = [f"{task['bytes'][one]:,}" for one in ("adapter.onnx_adapter", "adapter_model.safetensors")]
        rows.append(
            [
                name,
                f"{task['num_texts']:,}",
                f"{task['max_deviation']:.1e}",
                str(task["num_other_labels"]),
                int8["metric"],
                f"{before:.2f}",
                f"{alone - before:+.2f}",
                str(tasks_only["num_other_labels"]),
                f"{after - before:+.2f}",
                str(int8["num_other_labels"]),
                *sizes,
            ]
        )
    header = ["task", "texts", "largest deviation", "other labels", "metric", "PyTorch"]
    header += ["tasks in int8", "other labels", "all in int8", "other labels", "bytes for ONNX Runtime", "for PEFT"]
    return "\n\n".join(
        [
            "## Exported tasks",
            f"{report['backbone']} and tasks of the tables on all data (task, method, seed) in ONNX Runtime, on their "
            "whole validation sets. Deviation and labels of the float32 graph, score x 100, how far it and labels "
            "move with the tasks alone in int8, and with the backbone, too; bytes of the int8 tasks. By `sparsepeft "
            "export --int8` of tasks that `sparsepeft reproduce table1 --keep-weights` trained.",
            table(header, rows),
        ]
    )


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
