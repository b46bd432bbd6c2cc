"""The format executorch: one program for all tasks, whose tensors are inputs of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sparsepeft.errors import RunFailed
from sparsepeft.export.files import TASKS, TOKENIZER, file_sizes, write_description, write_task, write_tokenizer
from sparsepeft.export.job import Job, check
from sparsepeft.inference.predictions import Text, prediction

PROGRAM = "backbone.pte"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def export_executorch(job: Job, folder: Path, *, tolerance: float) -> dict[str, Any]:
    """Write one program, lowered to XNNPACK where that can be, and each task's tensors, which it takes as inputs.

    The backbone's weights are there once, since the program is the same for all tasks. It answers one text at a time,
    of up to as many tokens as the longest task takes; its inputs come in the order that the report gives.

    Args:
        job: what to export.
        folder: empty.
        tolerance: how far scores may be from PyTorch's.

    Returns:
        What belongs into the report.

    Raises:
        RunFailed: the model cannot be traced or lowered, or deviates by more than the tolerance.
    """
    job.progress("tracing the backbone")
    longest = max(job.max_lengths)
    program = job.graph.trace(job.inputs, job.shapes, batch_size=1, max_length=longest)
    job.progress("lowering it to ExecuTorch")
    (folder / PROGRAM).write_bytes(_lower(program))
    write_tokenizer(job.tokenizer, folder / TOKENIZER)
    for task, tensors, max_length in zip(job.tasks, job.tensors, job.max_lengths, strict=True):
        own = folder / TASKS / task.name
        write_task(task, tensors, own, int8=False)
        write_description(task, own, max_length=max_length, backbone=job.backbone_name)
    tasks = check(job, _Runner(job, folder), tolerance)
    for name, report in tasks.items():
        report["bytes"] = file_sizes(folder / TASKS / name)
    graph = {"dtype": "float32", "max_length": longest, "inputs": [*job.inputs, *job.shapes]}
    return {"graph": graph, "bytes": file_sizes(folder), "tasks": tasks}


def _lower(program: torch.export.ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Its check of operators knows none that move whole tensors, such as the memory's scatter.
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            buffer: bytes = edge.to_executorch().buffer
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailed(
            f"The installed ExecuTorch could not lower the traced model ({reason}); pass `format=onnx`."
        ) from error
    finally:
        logging.disable(before)
    return buffer


class _Runner:
    """Answers like an exported ``run.py``, from the program."""

    def __init__(self, job: Job, folder: Path) -> None:
        from executorch.runtime import Runtime

        self._job = job
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._program = Runtime.get().load_program(folder / PROGRAM)
        self._method = self._program.load_method("forward")

    def answer(self, name: str, texts: list[Text]) -> Iterator[dict[str, Any]]:
        index = [task.name for task in self._job.tasks].index(name)
        info = self._job.tasks[index].info
        tensors = [self._job.tensors[index][key].detach().contiguous() for key in self._job.shapes]
        self._tokenizer.enable_truncation(self._job.max_lengths[index])
        for encoded in self._tokenizer.encode_batch(texts):
            values = (encoded.ids, encoded.attention_mask, encoded.type_ids)
            feed = {key: torch.tensor([value]) for key, value in zip(_INPUTS, values, strict=True)}
            (logits,) = self._method.execute([*(feed[key] for key in self._job.inputs), *tensors])
            found = prediction(np.array(logits[0]), info.label_names, multi_label=info.multi_label)
            yield {"label": found.label, "score": found.score, "scores": found.scores}
