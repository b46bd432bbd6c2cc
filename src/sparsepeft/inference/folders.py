"""Tasks by name: folders that are named one by one, and those inside a folder of tasks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from sparsepeft.backbones import backbone_of_run
from sparsepeft.errors import UserError
from sparsepeft.runs.files import RUN, read_run

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_ONE_OF_THESE = (_ADAPTER, RUN)  # a fully tuned run has no adapter


def named_tasks(named: Sequence[str], tasks_dir: Path | None) -> dict[str, Path]:
    """The folder of each task, by name: those named, and all in the tasks folder.

    Args:
        named: ``NAME=FOLDER`` each.
        tasks_dir: whose folders are tasks, each called like its folder.

    Raises:
        UserError: a name without a folder, or twice; or no tasks folder.
    """
    tasks: dict[str, Path] = {}
    for one in named:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--task {one} was given; expected NAME=FOLDER, such as --task mood=out/mood.")
        if name in tasks:
            raise UserError(f"--task {name}=... was given twice; give each task a name of its own.")
        tasks[name] = Path(folder)
    for name, path in task_folders(tasks_dir).items() if tasks_dir is not None else ():
        if name in tasks:
            raise UserError(f"The task {name!r} is named by --task and in {tasks_dir}; rename one of them.")
        tasks[name] = path
    for path in sorted(tasks_dir.iterdir()) if tasks_dir is not None else ():
        if path.name not in tasks and path.is_symlink() and _has_task(path):
            logger.warning("%s was left out, as it leads out of the folder; name its task by --task", path)
    return tasks


def task_folders(root: Path) -> dict[str, Path]:
    """The folders of tasks, by name: those that are whole.

    Raises:
        UserError: there is no such folder.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"The tasks folder {root} cannot be read ({error}); pass a folder.") from error
    return {path.name: path for path in folders if _is_task(path, root)}


def backbone_of_tasks(tasks: Mapping[str, Path], model: str | None, *, must_exist: bool = False) -> str | None:
    """The backbone of tasks: the caller's ``model``, or else what the first among them that says so was trained on.

    Args:
        tasks: folder of each by its name.
        model: the caller's.
        must_exist: a backbone that is gone is an error; else one of another task is taken.

    Returns:
        What an engine takes; None, which is the default, where no folder says.

    Raises:
        UserError: the backbone of a task is gone, or its files are damaged.
    """
    for path in () if model is not None else tasks.values():
        with nullcontext() if must_exist else suppress(UserError):  # told when the task is loaded
            if (path / RUN).is_file():
                return backbone_of_run(path, None, read_run(path)["config"]["model"])
            if stored := _backbone_of_adapter(path):
                return backbone_of_run(path, None, stored)
    return model


def _backbone_of_adapter(folder: Path) -> str | None:
    """What an adapter's config names; None where it names none, or is damaged, which is told when it is loaded."""
    try:
        content = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    stored = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return stored if isinstance(stored, str) else None


def _is_task(folder: Path, root: Path) -> bool:
    return _has_task(folder) and folder.resolve().parent == root.resolve()


def _has_task(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in _ONE_OF_THESE)
    except OSError:  # such as a folder that may not be read; the others may
        return False
