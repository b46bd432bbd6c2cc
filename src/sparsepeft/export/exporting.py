"""Exporting tasks: the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.export.executorch_files import export_executorch
from sparsepeft.export.files import REPORT, WRITTEN, check_output
from sparsepeft.export.formats import check_format, versions
from sparsepeft.export.job import Job
from sparsepeft.export.onnx_files import export_onnx
from sparsepeft.export.openvino_files import export_openvino
from sparsepeft.folders import replacing, write_json
from sparsepeft.provenance import environment

FORMAT_VERSION = 1


def export_tasks(
    folders: Sequence[str | Path],
    output_dir: str | Path,
    *,
    format: str = "onnx",
    int8: bool = False,
    model: str | None = None,
    data_dir: str | None = None,
    tolerance: float = 1e-4,
    max_examples: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Export tasks of one backbone into one folder: the backbone once, a folder of small files for each task.

    Every task is compared with PyTorch on real text, its own validation set where that is at hand.

    Args:
        folders: of the tasks, as written by ``sparsepeft train`` or ``save_pretrained``; a task is called after its
            folder.
        output_dir: written whole or not at all.
        format: onnx, openvino or executorch.
        int8: weights of backbone and tasks in int8; scores before and after are reported. The format onnx only.
        model: the backbone, if it has moved since training.
        data_dir: folder with the tasks' data, if it has moved.
        tolerance: largest deviation from PyTorch, in probabilities or predicted values, before any quantization.
        max_examples: check on a sample of so many texts.
        overwrite: replace an export that is already in ``output_dir``.
        progress: called with what is being done.

    Returns:
        The content of ``export.json``.

    Raises:
        UserError: a folder, the backbone or an option cannot be used, or the tasks cannot share one graph.
        RunFailed: the model cannot be exported, or what was exported deviates too much.
    """
    check_format(format, int8)
    if not tolerance > 0:
        raise UserError(f"`tolerance={tolerance!r}` was given, but it must be a positive number.")
    folder = Path(output_dir)
    check_output(folder, overwrite)
    with replacing(folder, WRITTEN) as staged:
        job = Job(folders, model, data_dir, max_examples, progress)
        if format == "executorch":
            found = export_executorch(job, staged, tolerance=tolerance)
        elif format == "openvino":
            found = export_openvino(job, staged, tolerance=tolerance)
        else:
            found = export_onnx(job, staged, int8=int8, tolerance=tolerance)
        report = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "backbone": job.backbone_name,
            "tolerance": tolerance,
            **found,
            "environment": environment(),
        }
        report["environment"]["versions"] |= versions(format)
        write_json(staged / REPORT, report)
    return report
