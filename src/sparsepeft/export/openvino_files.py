"""The format openvino: a folder with one model for OpenVINO, whose inputs the tasks' tensors are, and a runner."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparsepeft.export.files import (
    OPENVINO_RUNNER,
    TASKS,
    TOKENIZER,
    WEIGHTS,
    file_sizes,
    write_runner,
    write_tokenizer,
)
from sparsepeft.export.job import Job, add_changes, check, write_tasks
from sparsepeft.export.onnx_graph import graph_of

MODEL = "backbone.xml"
BFLOAT16 = "bfloat16"  # in the report: what computing in it changes
_PRECISIONS = {"float32": "f32", BFLOAT16: "bf16"}


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this machine."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def export_openvino(job: Job, folder: Path, *, tolerance: float) -> dict[str, Any]:
    """Write a folder that ``run.py`` in it answers from.

    The model is compared with PyTorch in float32, and in bfloat16 where this machine has it: there OpenVINO takes that
    unless it is told otherwise.

    Args:
        job: what to export.
        folder: empty.
        tolerance: how far scores in float32 may be from PyTorch's.

    Returns:
        What belongs into the report.

    Raises:
        UserError: the backbone is too large.
        RunFailed: the model cannot be traced or written, or deviates by more than the tolerance.
    """
    import openvino

    from sparsepeft.export.run_openvino import Runner

    graph = graph_of(job)
    job.progress("writing it for OpenVINO")
    content = graph.SerializeToString(deterministic=True)
    model = openvino.Core().read_model(content)
    model.set_friendly_name(hashlib.sha256(content).hexdigest())
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    write_tokenizer(job.tokenizer, folder / TOKENIZER)
    write_runner(folder, OPENVINO_RUNNER)
    write_tasks(job, folder, model.friendly_name, WEIGHTS)

    def runner(precision: str) -> Runner:
        return Runner(folder, torch.get_num_threads(), _PRECISIONS[precision])

    tasks = check(job, runner("float32"), tolerance)
    if has_bfloat16():
        add_changes(job, runner(BFLOAT16), tasks, BFLOAT16)
    for name, report in tasks.items():
        report["bytes"] = file_sizes(folder / TASKS / name)
    about = {"dtype": "float32", "inputs": job.inputs}
    return {"graph": about, "bytes": file_sizes(folder), "tasks": tasks}
