"""What can be said of a task's name, files and columns before torch, transformers or `datasets` is loaded."""

from __future__ import annotations

from os import PathLike

from sparsepeft.tasks.bbc import find_bbc_file
from sparsepeft.tasks.glue import LAYOUTS, find_glue_files
from sparsepeft.tasks.loading import data_folder, own_options
from sparsepeft.tasks.local import find_columns, find_formats, read_local
from sparsepeft.tasks.registry import CUSTOM, LANGUAGE_MODEL, canonical_name

READ_WHOLE = 16 << 20  # bytes: so much is read twice in less than the time that torch takes to load


def check_task(
    task: str | None,
    data_dir: str | PathLike[str] | None = None,
    train_file: str | PathLike[str] | None = None,
    validation_file: str | PathLike[str] | None = None,
    test_file: str | PathLike[str] | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    problem_type: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> None:
    """Raise early what `load_task` would raise about names, files, columns and, unless files are large, rows.

    Args:
        task: its name; None is ``"custom"`` where there is a training file, and else nothing to check; a language
            model has no task data.
        data_dir, ..., encoding: see `load_task`.

    Raises:
        TaskError: something given cannot be used.
    """
    own = {name: value for name, value in locals().items() if name not in ("task", "data_dir")}
    if task == LANGUAGE_MODEL or (task is None and train_file is None):
        return
    name = canonical_name(task or CUSTOM)
    options = own_options(name, own)
    if options is not None:
        formats = find_formats(options)
        find_columns(options, formats)
        if sum(path.stat().st_size for path in options.files.values()) <= READ_WHOLE:
            read_local(CUSTOM, options)
        return
    folder = data_folder(data_dir) if name in LAYOUTS or name == "bbc-news" else None
    if folder is not None and name in LAYOUTS:
        find_glue_files(name, folder)
    elif folder is not None:
        find_bbc_file(name, folder)
