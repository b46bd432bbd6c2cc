"""What can be found wrong with a training before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.folders import check_not_in_use
from sparsepeft.methods.recipes import METHODS, RECIPES
from sparsepeft.runs.config_file import read_config
from sparsepeft.runs.output_folder import check_output_folder
from sparsepeft.tasks import FileOptions, check_task

_FILES = ("train_file", "validation_file", "test_file", "text", "validation_text")


def check_early(flags: Mapping[str, Any], file: Path | None, overwrite: bool) -> None:
    """Refuse what names no task, method, recipe, file or column, and an output folder that cannot be used.

    Args:
        flags: fields of a config, of which None means not given.
        file: a config file, over which the flags go.
        overwrite: a finished run may be replaced.

    Raises:
        UserError: a name or a file is unknown, the config file cannot be read, or the output folder holds something
            else or is being written to.
        RunFailed: the output folder cannot be written to.
    """
    values = {**read_config(file), **{key: value for key, value in flags.items() if value is not None}}
    for name, valid in (("method", METHODS), ("recipe", RECIPES)):
        value = values.get(name)
        if value is not None and value not in valid:
            raise UserError(unknown_name(name, str(value), valid))
    for name in _FILES:
        for path in _several(values.get(name)):
            if not Path(path).is_file():
                what = "that is a folder" if Path(path).is_dir() else "there is no such file"
                raise UserError(f"`{name}={path}` was given, but {what}; correct the path.")
    files: Any = {name: values.get(name) for name in FileOptions.__annotations__}
    check_task(values.get("task"), values.get("data_dir"), **files)
    if folder := values.get("output_dir"):
        check_output_folder(Path(folder), overwrite)
        check_not_in_use(Path(folder))


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Path)) else list(value or ())
