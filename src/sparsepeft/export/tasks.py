"""Which tasks are exported, and whether they can share one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsepeft.backbones import backbone_of_run, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.tasks import TaskInfo, info_of_run, read_task
from sparsepeft.models.token_heads import TOKEN_HEAD
from sparsepeft.runs.files import RUN, read_run
from sparsepeft.tuners.config import TaskAdapterConfig

Tensors = dict[str, torch.Tensor]
Shape = tuple[int | None, ...]

# What the graph computes with but no tensor holds: it is the same for all tasks of a graph.
_CONSTANTS = ("parent_keys", "top_k", "temperature", "style", "non_linearity")


@dataclass(frozen=True)
class ExportTask:
    """A task to export; its name is that of its folder."""

    name: str
    info: TaskInfo
    config: TaskAdapterConfig

    def is_of_head(self, tensor: str) -> bool:
        """Whether a tensor of this name in the graph belongs to the task's head."""
        return file_name(tensor).startswith(tuple(f"{name}." for name in self.config.head_modules or ()))


def file_name(tensor: str) -> str:
    """What a tensor of the graph is called in its task's file: heads that label tokens stand there beside the other."""
    return tensor.removeprefix(f"{TOKEN_HEAD}.")


def read_tasks(folders: Sequence[str | Path]) -> list[ExportTask]:
    """Describe the tasks in folders that ``sparsepeft train`` or ``save_pretrained`` wrote.

    Raises:
        UserError: no folder, one without a task, two of one name, or methods or settings that need different graphs.
    """
    if not folders:
        raise UserError("No folder was given; pass the output folder of at least one `sparsepeft train`.")
    tasks: dict[str, ExportTask] = {}
    for folder in map(Path, folders):
        name = folder.resolve().name
        if name in tasks:
            raise UserError(
                f"{tasks[name].info.folder} and {folder} have the same name, by which the exported task is asked for; "
                "rename one of them."
            )
        _check_run(folder)
        tasks[name] = ExportTask(name, *read_task(folder))
    first, *others = tasks.values()
    for other in others:
        for what in ("method", *_CONSTANTS):
            one, two = (getattr(task.config, what, None) for task in (first, other))
            if one != two:
                raise _cannot_share(first, other, f"their {what} is {one} and {two}")
    return list(tasks.values())


def _check_run(folder: Path) -> None:
    """Refuse a run whose model is not the backbone and an adapter.

    Raises:
        UserError: it was fully tuned or is sparse.
    """
    if not (folder / RUN).is_file():
        return
    run = read_run(folder)
    info_of_run(folder, run)  # a language model is refused by name
    if run["config"]["method"] == "full":
        raise UserError(
            f"{folder} holds a run of full fine-tuning, which cannot be exported as a task: its model shares no "
            "backbone; train with an adapter method, such as spartan."
        )
    if run["config"]["spt"] is not None:
        raise UserError(
            f"{folder} holds a run with `spt`, but sparse models cannot be exported; train on the dense model, without "
            "`spt`."
        )


def backbone_of(task: ExportTask) -> str:
    """What to hand to ``from_pretrained`` for the task's backbone.

    Raises:
        UserError: the task does not say, or there is nothing there.
    """
    if (task.info.folder / RUN).is_file():
        return backbone_of_run(task.info.folder, None, read_run(task.info.folder)["config"]["model"])
    if not task.config.base_model_name_or_path:
        raise UserError(f"adapter_config.json in {task.info.folder} names no backbone; pass it as `model`.")
    return resolve_model(task.config.base_model_name_or_path)


def common_shapes(tasks: Sequence[ExportTask], tensors: Sequence[Tensors]) -> dict[str, Shape]:
    """The shape of each tensor, None where tasks differ.

    Heads for tokens and heads for texts are different tensors, of which a task has the ones or the others.

    Args:
        tensors: those of each task by name.

    Raises:
        UserError: the tasks have different tensors, or memories of which only some keep all their parents.
    """
    _check_names(tasks, tensors)
    shapes: dict[str, Shape] = {}
    for name in dict.fromkeys(name for named in tensors for name in named):
        having = [index for index, named in enumerate(tensors) if name in named]
        of_tasks = [tuple(tensors[index][name].shape) for index in having]
        for index, shape in zip(having, of_tasks, strict=True):
            if len(shape) != len(of_tasks[0]):
                why = f"{name} has shapes {list(of_tasks[0])} and {list(shape)}"
                raise _cannot_share(tasks[having[0]], tasks[index], why)
        shapes[name] = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*of_tasks, strict=True))
    keeps_all = [getattr(task.config, "num_parents", 0) == getattr(task.config, "top_k", None) for task in tasks]
    if len(set(keeps_all)) > 1:
        other = tasks[keeps_all.index(not keeps_all[0])]
        raise _cannot_share(tasks[0], other, "one keeps all parents (num_parents = top_k), the other selects")
    return shapes


def _check_names(tasks: Sequence[ExportTask], tensors: Sequence[Tensors]) -> None:
    """See that each task has the tensors of the first one, and of the first of its kind the head's, too."""
    first_of_kind: dict[bool, int] = {}
    for index, task in enumerate(tasks):
        same_kind = first_of_kind.setdefault(task.info.labels_tokens, index)
        for first, with_head in ((0, False), (same_kind, True)):
            expected, found = (
                {name for name in tensors[i] if with_head or not tasks[i].is_of_head(name)} for i in (first, index)
            )
            missing, more = sorted(expected - found), sorted(found - expected)
            if missing or more:
                what = f"has no {missing[0]}" if missing else f"also has {more[0]}"
                raise _cannot_share(tasks[first], task, f"{task.name} {what}")


def _cannot_share(first: ExportTask, other: ExportTask, why: str) -> UserError:
    return UserError(
        f"The tasks {first.name} and {other.name} cannot share one graph: {why}; export them into folders of their own."
    )
