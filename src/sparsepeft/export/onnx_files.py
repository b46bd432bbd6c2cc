"""The format onnx: a folder with one graph, the tasks' adapters, and a runner."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsepeft.export.files import ADAPTER, RUNNER, TOKENIZER, write_runner, write_tokenizer
from sparsepeft.export.job import Job, Reports, add_changes, check, write_tasks
from sparsepeft.export.onnx_graph import IR_VERSION, OPSET, graph_of, open_adapter, quantize
from sparsepeft.models.quantized import INT8

if TYPE_CHECKING:
    import onnx

    from sparsepeft.export.run import Runner

GRAPH = "backbone.onnx"
INT8_TASKS = "int8_tasks"  # in the report: the tasks alone in int8, on a float32 backbone


def export_onnx(job: Job, folder: Path, int8: bool) -> tuple[dict[str, Any], Reports]:
    """Write a folder that ``run.py`` in it answers from.

    The float32 graph is compared with PyTorch in any case. With ``int8`` it is then compared with the tasks in int8,
    and last with the backbone in int8, too, which is what stays: weights of the backbone, and rows of the tasks'
    tensors.

    Returns:
        What belongs into the report on the graph, and on each task.

    Raises:
        UserError: the backbone is too large for one file.
        RunFailed: the model cannot be traced or written, or in float32 deviates by more than the tolerance.
    """
    graph = graph_of(job)
    if int8:
        job.progress("quantizing it")
        quantized = quantize(graph)
        tasks = check(job, _write(job, copy.deepcopy(graph), folder / "float32", int8=False))
        shutil.rmtree(folder / "float32")
        add_changes(job, _write(job, graph, folder / INT8_TASKS, int8=True), tasks, INT8_TASKS)
        shutil.rmtree(folder / INT8_TASKS)
        add_changes(job, _write(job, quantized, folder, int8=True), tasks, INT8)
    else:
        tasks = check(job, _write(job, graph, folder, int8=False))
    about = {"opset": OPSET, "ir_version": IR_VERSION, "dtype": INT8 if int8 else "float32", "inputs": job.inputs}
    return about, tasks


def _write(job: Job, graph: onnx.ModelProto, folder: Path, *, int8: bool) -> Runner:
    """Write all but the report, and open it; ``graph`` is changed."""
    import onnx

    from sparsepeft.export.run import Runner

    folder.mkdir(exist_ok=True)
    optional = [name for name in job.shapes if not all(name in tensors for tensors in job.tensors)]
    open_adapter(graph, job.shapes, int8, optional)
    onnx.save(graph, str(folder / GRAPH))
    write_tokenizer(job.tokenizer, folder / TOKENIZER)
    write_runner(folder, RUNNER)
    write_tasks(job, folder, graph.graph.name, ADAPTER, int8=int8)
    return Runner(folder, torch.get_num_threads())
