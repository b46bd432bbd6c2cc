"""The format onnx: a folder with one graph, the tasks' adapters, and a runner."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsepeft.export.files import ADAPTER, RUNNER, TASKS, TOKENIZER, file_sizes, write_runner, write_tokenizer
from sparsepeft.export.job import Job, add_changes, check, write_tasks
from sparsepeft.export.onnx_graph import IR_VERSION, OPSET, graph_of, open_adapter, quantize
from sparsepeft.models.quantized import INT8

if TYPE_CHECKING:
    import onnx

GRAPH = "backbone.onnx"
INT8_TASKS = "int8_tasks"  # in the report: the tasks alone in int8, on a float32 backbone


def export_onnx(job: Job, folder: Path, *, int8: bool, tolerance: float) -> dict[str, Any]:
    """Write a folder that ``run.py`` in it answers from.

    The float32 graph is compared with PyTorch in any case. With ``int8`` it is then compared with the tasks in int8,
    and last with the backbone in int8, too, which is what stays.

    Args:
        job: what to export.
        folder: empty.
        int8: weights of the backbone, and rows of the tasks' tensors, in int8.
        tolerance: how far scores of the float32 graph may be from PyTorch's.

    Returns:
        What belongs into the report.

    Raises:
        UserError: the backbone is too large for one file.
        RunFailed: the model cannot be traced or written, or deviates by more than the tolerance.
    """
    from sparsepeft.export.run import Runner

    graph = graph_of(job)
    if int8:
        job.progress("quantizing it")
        quantized = quantize(graph)
        _write(job, copy.deepcopy(graph), folder / "float32", int8=False)
        tasks = check(job, Runner(folder / "float32", torch.get_num_threads()), tolerance)
        shutil.rmtree(folder / "float32")
        _write(job, graph, folder / INT8_TASKS, int8=True)
        add_changes(job, Runner(folder / INT8_TASKS, torch.get_num_threads()), tasks, INT8_TASKS)
        shutil.rmtree(folder / INT8_TASKS)
        _write(job, quantized, folder, int8=True)
        add_changes(job, Runner(folder, torch.get_num_threads()), tasks, INT8)
    else:
        _write(job, graph, folder, int8=False)
        tasks = check(job, Runner(folder, torch.get_num_threads()), tolerance)
    for name, report in tasks.items():
        report["bytes"] = file_sizes(folder / TASKS / name)
    about = {"opset": OPSET, "ir_version": IR_VERSION, "dtype": INT8 if int8 else "float32", "inputs": job.inputs}
    return {"graph": about, "bytes": file_sizes(folder), "tasks": tasks}


def _write(job: Job, graph: onnx.ModelProto, folder: Path, *, int8: bool) -> None:
    """Write all but the report; ``graph`` is changed."""
    import onnx

    folder.mkdir(exist_ok=True)
    open_adapter(graph, job.shapes, int8)
    onnx.save(graph, str(folder / GRAPH))
    write_tokenizer(job.tokenizer, folder / TOKENIZER)
    write_runner(folder, RUNNER)
    write_tasks(job, folder, graph.graph.name, ADAPTER, int8=int8)
