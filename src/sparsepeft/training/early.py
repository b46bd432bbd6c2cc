"""Looking at options and data as a training would read them, before there is one and before PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.folders import check_not_in_use
from sparsepeft.launch import is_first
from sparsepeft.methods.recipes import METHODS, RECIPES
from sparsepeft.runs.config_file import read_config
from sparsepeft.runs.folder import check_output_folder
from sparsepeft.tasks import FileOptions, check_task
from sparsepeft.tasks.spec import CUSTOM, canonical_name

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
        value = values.get(name)
        for path in [value] if isinstance(value, (str, Path)) else value or ():
            if not Path(path).is_file():
                what = "that is a folder" if Path(path).is_dir() else "there is no such file"
                raise UserError(f"`{name}={path}` was given, but {what}; correct the path.")
    files: Any = {name: values.get(name) for name in FileOptions.__annotations__}
    check_task(values.get("task"), values.get("data_dir"), **files)
    if is_first() and (folder := values.get("output_dir")):  # which is in use by the first process for the others
        check_output_folder(Path(folder), overwrite)
        check_not_in_use(Path(folder))


def preview(task: str, model: str | None = None, **options: Any) -> dict[str, Any]:
    """Describe a task's data and how long its texts are for a model, of which only the tokenizer is loaded.

    Args:
        task: its name; ``"custom"`` takes own files.
        model: hub id or local folder; None is the bundled MiniLM.
        **options: of :func:`sparsepeft.tasks.load_task`.

    Returns:
        What JSON can hold: see :func:`sparsepeft.tasks.preview.describe_data`; ``tokens`` as
        :func:`sparsepeft.tasks.preview.describe_lengths` has them; for own files also ``files`` and ``columns``.

    Raises:
        UserError: the data or the model cannot be used.
    """
    from transformers import AutoConfig, AutoTokenizer

    from sparsepeft.inference.encoding import longest_input
    from sparsepeft.tasks import load_task
    from sparsepeft.tasks.local import LocalFiles
    from sparsepeft.tasks.preview import describe_data, describe_lengths

    name = resolve_model(model)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        from sparsepeft.methods.models import not_loaded  # PEFT takes a second

        raise UserError(not_loaded("tokenizer of the model", name, error)) from error
    limit = longest_input(tokenizer, config, None)
    data = load_task(task, **options)
    files: Any = {key: value for key, value in options.items() if key != "data_dir"}
    described_files = LocalFiles(files).describe() if canonical_name(task) == CUSTOM else {}
    lengths = {"model": describe_backbone(name), **describe_lengths(data, tokenizer, limit)}
    return {**describe_data(data), **described_files, "tokens": lengths}
