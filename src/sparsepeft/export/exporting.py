"""Exporting tasks: the formats, what each needs, and the whole of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.export.executorch_files import export_executorch
from sparsepeft.export.files import REPORT, TASKS, WRITTEN, file_sizes
from sparsepeft.export.job import Job
from sparsepeft.export.onnx_files import export_onnx
from sparsepeft.export.openvino_files import export_openvino
from sparsepeft.extras import require
from sparsepeft.folders import check_output, replacing, write_json
from sparsepeft.provenance import environment

FORMAT_VERSION = 1
# Modules, each of a package with the name before the first dot.
_MODULES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": (
        "executorch.exir",
        "executorch.runtime",
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
    ),
}
_WHY_NOT_INT8 = {
    "openvino": "it computes in bfloat16 instead, where the processor has it",
    "executorch": "quantizing for it needs example texts for its calibration, which is not built in",
}
FORMATS = tuple(_MODULES)


def export_tasks(
    folders: Sequence[str | Path],
    output_dir: str | Path,
    *,
    format: str = "onnx",
    int8: bool = False,
    model: str | None = None,
    data_dir: str | None = None,
    split: str = "validation",
    tolerance: float = 1e-4,
    max_examples: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Export tasks of one backbone into one folder: the backbone once, a folder of small files for each task.

    Every task is compared with PyTorch on real text, its own held-out data where that is at hand.

    Args:
        folders: of the tasks, as written by ``sparsepeft train`` or ``save_pretrained``; a task is called after its
            folder.
        output_dir: written whole or not at all.
        format: onnx, openvino or executorch.
        int8: weights of backbone and tasks in int8; scores before and after are reported. The format onnx only.
        model: the backbone, if it has moved since training.
        data_dir: folder with the tasks' data, if it has moved.
        split: part of the tasks' data to check on, such as ``"test"``.
        tolerance: largest deviation from PyTorch, in probabilities or predicted values, before any quantization.
        max_examples: check on a sample of so many texts.
        overwrite: replace an export that is already in ``output_dir``.
        progress: called with what is being done.

    Returns:
        The content of ``export.json``.

    Raises:
        UserError: a folder, the backbone or an option cannot be used, or the tasks cannot share one graph.
        RunFailed: the model cannot be exported, or what was exported deviates too much.

    Example:
        >>> report = export_tasks(["out/sst2", "out/rte"], "out/device", max_examples=8)
        >>> sorted(report["tasks"])
        ['rte', 'sst2']
    """
    check_format(format, int8)
    if not tolerance > 0:
        raise UserError(f"`tolerance={tolerance!r}` was given, but it must be a positive number.")
    folder = Path(output_dir)
    check_output(folder, (REPORT,), "an export", overwrite)
    with replacing(folder, WRITTEN) as staged:
        job = Job(folders, model, data_dir, split, max_examples, tolerance, progress)
        if format == "onnx":
            graph, tasks = export_onnx(job, staged, int8)
        else:
            graph, tasks = (export_openvino if format == "openvino" else export_executorch)(job, staged)
        for name, task in tasks.items():
            task["bytes"] = file_sizes(staged / TASKS / name)
        report: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "backbone": job.backbone_name,
            "tolerance": tolerance,
            "graph": graph,
            "bytes": file_sizes(staged),
            "tasks": tasks,
            "environment": environment(),
        }
        packages = (module.split(".")[0] for module in _MODULES[format])
        report["environment"]["versions"] |= {name: importlib.metadata.version(name) for name in packages}
        write_json(staged / REPORT, report)
    return report


def check_format(format: str, int8: bool = False) -> None:
    """See that a format can be written here.

    Raises:
        UserError: there is none of that name, its packages are not installed, or it has no int8.
    """
    if format not in FORMATS:
        raise UserError(unknown_name("The format", format, FORMATS))
    if int8 and format in _WHY_NOT_INT8:
        raise UserError(
            f"`int8=True` was given with `format={format}`, which has none: {_WHY_NOT_INT8[format]}; leave it out, or "
            "pass `format=onnx`."
        )
    for module in _MODULES[format]:
        require(module, f"export-{format}", f"The format {format}")
