"""The format executorch: one program for all tasks, whose tensors are inputs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from sparsepeft.errors import RunFailed, UserError, first_line
from sparsepeft.export.files import TOKENIZER, WEIGHTS, write_tokenizer
from sparsepeft.export.graph import quiet
from sparsepeft.export.job import Job, Reports, check, write_tasks
from sparsepeft.inference.portable import ExportedTasks, Input
from sparsepeft.tuners.files import PEFT_PREFIX

PROGRAM = "backbone.pte"


def export_executorch(job: Job, folder: Path) -> tuple[dict[str, Any], Reports]:
    """Write one program, lowered to XNNPACK where that can be, and each task's tensors, which it takes as inputs.

    The backbone's weights are there once, since the program is the same for all tasks. It answers one text at a time,
    of up to as many tokens as the longest task takes; its inputs come in the order that the report gives.

    Returns:
        What belongs into the report on the graph, and on each task.

    Raises:
        UserError: a task labels tokens.
        RunFailed: the model cannot be traced or lowered, or deviates by more than the tolerance.
    """
    for task in job.tasks:
        if task.info.labels_tokens:
            raise UserError(
                f"{task.info.folder} holds a task that labels tokens, but a program for ExecuTorch has the logits of "
                "whole texts alone; pass `format=onnx` or `format=openvino`, or leave the task out."
            )
    job.progress("tracing the backbone")
    longest = max(job.max_lengths)
    program = job.graph.trace(job.inputs, job.shapes, batch_size=1, max_length=longest)
    job.progress("lowering it to ExecuTorch")
    buffer = _lower(program)
    (folder / PROGRAM).write_bytes(buffer)
    name = hashlib.sha256(buffer).hexdigest()
    write_tokenizer(job.tokenizer, folder / TOKENIZER)
    write_tasks(job, folder, name, WEIGHTS)
    graph = {"dtype": "float32", "max_length": longest, "inputs": [*job.inputs, *job.shapes]}
    return graph, check(job, _Runner(job, folder, name))


def _lower(program: torch.export.ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    try:
        with quiet():
            # Its check of operators knows none that move whole tensors, such as the memory's scatter.
            edge = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
            )
            return edge.to_executorch().buffer
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RunFailed(
            f"The installed ExecuTorch could not lower the traced model ({first_line(error)}); pass `format=onnx`."
        ) from error


class _Runner(ExportedTasks):
    """Answers from the program, one text at a time."""

    weights = WEIGHTS

    def __init__(self, job: Job, folder: Path, graph: str) -> None:
        from executorch.runtime import Runtime

        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        tokenizer.no_padding()
        super().__init__(folder, tokenizer, graph)
        self._job = job
        self._method = Runtime.get().load_program(folder / PROGRAM).load_method("forward")

    def answer(
        self, name: str, texts: Iterable[Input], batch_size: int = 1, joined: bool = True
    ) -> Iterator[dict[str, Any]]:
        """As any runner does."""
        return super().answer(name, texts, batch_size, joined)

    def load(self, file: Path) -> list[torch.Tensor]:
        """A task's tensors in the program's order."""
        tensors = load_file(file)
        return [tensors[PEFT_PREFIX + key] for key in self._job.shapes]

    def logits(self, adapter: list[torch.Tensor], inputs: dict[str, np.ndarray], of_tokens: bool = False) -> np.ndarray:
        """(1, number of labels)."""
        (logits,) = self._method.execute([*(torch.from_numpy(inputs[key]) for key in self._job.inputs), *adapter])
        return np.array(logits)
