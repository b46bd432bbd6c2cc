"""What all formats export from: the tasks, loaded once for PyTorch's answers and once for tracing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import RunFailed
from sparsepeft.export.checking import (
    Answers,
    Examples,
    differences,
    eager_answers,
    examples_of,
    exported_answers,
    score,
)
from sparsepeft.export.files import ADAPTER, TASKS, write_onnx_adapter, write_task
from sparsepeft.export.graph import TaskGraph
from sparsepeft.export.tasks import Tensors, backbone_of, common_shapes, file_name, read_tasks
from sparsepeft.folders import write_json
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.inference.encoding import longest_input
from sparsepeft.inference.engine import load_backbone
from sparsepeft.inference.portable import ExportedTasks
from sparsepeft.methods.models import load_tokenizer, set_pad_token
from sparsepeft.models.quantized import SCALE

Reports = dict[str, dict[str, Any]]  # of tasks, by name


class Job:
    """Tasks to export, with what is needed to check them.

    Args:
        folders: one for each task.
        model: the backbone, if it is not where the tasks say.
        data_dir: where the tasks' data is; None for where it was in training.
        split: part of the tasks' data to check on.
        max_examples: check on a sample of so many texts; None for the whole part.
        tolerance: how far scores in float32 may be from PyTorch's.
        progress: called with what is being done.

    Attributes:
        tensors: each task's, by name.
        shapes: of the tensors, None where tasks differ.
        outputs: names of what the graph gives: logits, and those of tokens where a task labels these.
        inputs: names of the model's inputs, as the tokenizer gives them.
        max_lengths: tokens an input may have, task by task.

    Raises:
        UserError: a folder or the backbone cannot be used, or the tasks cannot share one graph.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        model: str | None,
        data_dir: str | None,
        split: str,
        max_examples: int | None,
        tolerance: float,
        progress: Callable[[str], None],
    ) -> None:
        self.progress, self.tolerance = progress, tolerance
        self._data_dir, self._split, self._max_examples = data_dir, split, max_examples
        self.tasks = read_tasks(folders)
        name = resolve_model(model) if model is not None else backbone_of(self.tasks[0])
        progress("loading the backbone and its tasks")
        self.backbone_name = describe_backbone(name)
        backbone = load_backbone(name, torch.float32)
        self.tokenizer = load_tokenizer(name)
        set_pad_token(backbone, self.tokenizer)
        self._engine = MultiTaskEngine(
            backbone, {task.name: task.info.folder for task in self.tasks}, tokenizer=self.tokenizer
        )
        # After the engine, whose modules are copies that share the weights.
        self.graph = TaskGraph(backbone, self.tasks)
        self.tensors: list[Tensors] = self.graph.tensors
        self.shapes = common_shapes(self.tasks, self.tensors)
        self.inputs = list(self.tokenizer("a"))
        self.outputs = ["logits", *(["token_logits"] if any(task.info.labels_tokens for task in self.tasks) else [])]
        self.max_lengths = [longest_input(self.tokenizer, backbone.config, task.info.max_length) for task in self.tasks]
        self._expected: dict[str, tuple[Examples, Answers]] = {}

    def expected(self, index: int) -> tuple[Examples, Answers]:
        """A task's examples and PyTorch's answers to them."""
        task = self.tasks[index]
        if task.name not in self._expected:
            examples = examples_of(task, self._data_dir, self._max_examples, self._split)
            self.progress(f"answering {len(examples.texts)} texts of {task.name} with PyTorch")
            self._expected[task.name] = eager_answers(self._engine, task.name, examples)
        return self._expected[task.name]


def check(job: Job, runner: ExportedTasks) -> Reports:
    """Compare each exported task's answers with PyTorch's; what was found, by task.

    Raises:
        RunFailed: one deviates by more than the tolerance.
    """
    reports: Reports = {}
    for index, task in enumerate(job.tasks):
        examples, expected = job.expected(index)
        job.progress(f"comparing {task.name} on {len(examples.texts)} texts")
        compared = differences(expected, exported_answers(runner, task.name, examples))
        if not compared["max_deviation"] <= job.tolerance:  # NaN, too
            raise RunFailed(
                f"The exported task {task.name} deviates from PyTorch by {compared['max_deviation']:.2g} in its scores "
                f"(by {compared['usual_deviation']:.2g} in all but one of 1,000), but at most {job.tolerance:.2g} was "
                "allowed; nothing was written. Pass a larger `tolerance` if that is good enough, as where a few texts "
                "pick another parent cell because of rounding."
            )
        reports[task.name] = {"checked_on": examples.source, **compared}
    return reports


def add_changes(job: Job, runner: ExportedTasks, reports: Reports, key: str) -> None:
    """Add to each task's report, under ``key``, what a lower precision changes."""
    for index, task in enumerate(job.tasks):
        examples, expected = job.expected(index)
        job.progress(f"answering {len(examples.texts)} texts of {task.name} ({key})")
        answers = exported_answers(runner, task.name, examples)
        changed = {name: value for name, value in differences(expected, answers).items() if name != "num_texts"}
        if examples.spec is not None:
            changed |= {
                "metric": examples.spec.main_metric,
                "before": score(examples, expected),
                "after": score(examples, answers),
            }
        reports[task.name][key] = changed


def write_tasks(job: Job, folder: Path, graph: str, weights: str, *, int8: bool = False) -> None:
    """Write each task's folder, with the ``task.json`` that a runner knows it from.

    Args:
        graph: name of the backbone's graph.
        weights: file of a task that the runner reads: :data:`~sparsepeft.export.files.WEIGHTS` or ``ADAPTER``.
        int8: weights in int8.
    """
    for task, tensors, max_length in zip(job.tasks, job.tensors, job.max_lengths, strict=True):
        task_folder = folder / TASKS / task.name
        names = {file_name(name): name for name in tensors}
        stored = write_task(task, {name: tensors[names[name]] for name in names}, task_folder, int8)
        if weights == ADAPTER:
            scales = {name + SCALE: of_graph + SCALE for name, of_graph in names.items()}
            write_onnx_adapter({(names | scales)[key]: each for key, each in stored.items()}, task_folder / ADAPTER)
        description = {
            "labels": task.info.label_names,
            "multi_label": task.info.multi_label,
            "labels_tokens": task.info.labels_tokens,
            "by_word": task.info.is_by_word,
            "names": {name: other for name, other in names.items() if name != other},
            "thresholds": task.info.thresholds,
            "num_texts": task.info.num_texts,
            "max_length": max_length,
            "truncation_side": job.tokenizer.truncation_side,
            "backbone": job.backbone_name,
            "graph": graph,
            "sha256": hashlib.sha256((task_folder / weights).read_bytes()).hexdigest(),
        }
        write_json(task_folder / "task.json", description)
