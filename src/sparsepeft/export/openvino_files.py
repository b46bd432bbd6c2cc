"""The format openvino: a folder with one model for OpenVINO, whose inputs the tasks' tensors are, and a runner."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparsepeft.export.files import OPENVINO_RUNNER, TOKENIZER, WEIGHTS, write_runner, write_tokenizer
from sparsepeft.export.job import Job, Reports, add_changes, check, write_tasks
from sparsepeft.export.onnx_graph import graph_of

MODEL = "backbone.xml"
BFLOAT16 = "bfloat16"  # in the report: what computing in it changes


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this machine."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def export_openvino(job: Job, folder: Path) -> tuple[dict[str, Any], Reports]:
    """Write a folder that ``run.py`` in it answers from.

    The model is compared with PyTorch in float32, and in bfloat16 where this machine has it: there OpenVINO takes that
    unless it is told otherwise.

    Returns:
        What belongs into the report on the graph, and on each task.

    Raises:
        UserError: the backbone is too large.
        RunFailed: the model cannot be traced or written, or in float32 deviates by more than the tolerance.
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

    tasks = check(job, Runner(folder, torch.get_num_threads(), "f32"))
    if has_bfloat16():
        add_changes(job, Runner(folder, torch.get_num_threads(), "bf16"), tasks, BFLOAT16)
    return {"dtype": "float32", "inputs": job.inputs}, tasks
