"""`load_task` and `check_task`: a task by name from its files, from the hub, or from what the package brings."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final, Literal, Unpack

from sparsepeft.errors import TaskError
from sparsepeft.rows.formats import find_format
from sparsepeft.rows.reading import sha256
from sparsepeft.tasks.bbc import find_bbc_file, load_bbc_files, load_bbc_hub
from sparsepeft.tasks.columns import Columns
from sparsepeft.tasks.glue import LAYOUTS, find_glue_files, load_glue_files, load_glue_hub
from sparsepeft.tasks.goemotions import find_goemotions_files, load_goemotions_files, load_goemotions_hub
from sparsepeft.tasks.local import FileOptions, LocalFiles, PathLike, load_labelled, load_local
from sparsepeft.tasks.spec import CUSTOM, LANGUAGE_MODEL, SPECS, TaskData, canonical_name
from sparsepeft.tasks.wnut import find_wnut_files, load_wnut

DATA_VARIABLE: Final = "SPARSEPEFT_DATA"
SOURCES: Final = ("auto", "files", "hub")
CHECKED_WHOLE: Final = 16 << 20  # bytes: so much is read twice in less than the time that torch takes to load
# What finds a task's files in the data folder, or says what is missing.
_FINDERS: Final[dict[str, Callable[[str, Path], object]]] = {
    **dict.fromkeys(LAYOUTS, find_glue_files),
    "bbc-news": find_bbc_file,
    "goemotions": find_goemotions_files,
}


def load_task(
    name: str,
    *,
    data_dir: PathLike | None = None,
    seed: int = 42,
    source: Literal["auto", "files", "hub"] = "auto",
    **files: Unpack[FileOptions],
) -> TaskData:
    """Load a task's training, validation and (where labels are public) test sets.

    Example:
        >>> load_task("topics").spec.label_names
        ('business', 'health', 'science', 'sport', 'travel')
        >>> data = load_task("rte", data_dir="DATA")  # DATA/rte/ or DATA/RTE/
        >>> sorted(data.train[0])
        ['label', 'text', 'text_pair']
        >>> data = load_task("custom", train_file="reviews.csv", label_column="mood")

    Args:
        name: one of `task_names`, or another spelling of it such as ``"SST-2"``.
        data_dir: folder with the files of GLUE, BBC News, GoEmotions and WNUT 2017; default: the variable
            ``SPARSEPEFT_DATA``.
        seed: decides the split of BBC News and the validation part of own files without a validation file.
        source: ``"files"``, ``"hub"``, or ``"auto"``: files if there is a data folder, else the hub.
        files: own files and how to read them, for ``"custom"``: the keys of :class:`FileOptions`.

    Raises:
        TaskError: unknown task, missing or malformed files, labels that do not fit, or an unreachable hub.
    """
    task = canonical_name(name)
    if source not in SOURCES:
        raise TaskError(f"`source={source}` was given; expected one of {', '.join(SOURCES)}")
    options = own_files(task, files)
    if options is not None:
        if source == "hub":
            raise TaskError(f"the task {CUSTOM!r} reads your own files; leave `source` at 'auto' or 'files'")
        return load_local(CUSTOM, options, seed)
    if task == "topics":
        return _load_topics(source)
    spec, folder = SPECS[task], data_folder(data_dir, source)
    if task == "wnut17":
        return load_wnut(spec, folder)
    if task == "bbc-news":
        return load_bbc_hub(spec, seed) if folder is None else load_bbc_files(spec, folder, seed)
    if task == "goemotions":
        return load_goemotions_hub(spec) if folder is None else load_goemotions_files(spec, folder)
    return load_glue_hub(spec) if folder is None else load_glue_files(spec, folder)


def check_task(task: str | None, data_dir: PathLike | None = None, **files: Unpack[FileOptions]) -> None:
    """Raise what `load_task` would raise about names, files, columns and, unless files are large, rows.

    For this, neither torch nor transformers nor `datasets` is loaded.

    Args:
        task: its name; None is ``"custom"`` where there is a training file, and else nothing to check; a language
            model has no task data.
        data_dir, files: see `load_task`.

    Raises:
        TaskError: something given cannot be used.
    """
    if task == LANGUAGE_MODEL or (task is None and files.get("train_file") is None):
        return
    name = canonical_name(task or CUSTOM)
    options = own_files(name, files)
    if options is not None:
        own = LocalFiles(options)
        if sum(path.stat().st_size for path in own.paths.values()) <= CHECKED_WHOLE:
            own.read(CUSTOM)
        return
    folder = data_folder(data_dir) if name != "topics" else None
    if name == "wnut17":
        find_wnut_files(name, folder)
    elif folder is not None and name in _FINDERS:
        _FINDERS[name](name, folder)


def own_files(task: str, files: FileOptions) -> FileOptions | None:
    """What was said about own files; None for a task that brings its own.

    Raises:
        TaskError: they are for such a task, or there is no training file.
        TypeError: an option has no such name.
    """
    if unknown := files.keys() - FileOptions.__annotations__.keys():
        raise TypeError(f"load_task knows no option {', '.join(sorted(unknown))}; see sparsepeft.tasks.FileOptions.")
    if task == CUSTOM:
        if files.get("train_file") is None:
            raise TaskError(f"the task {CUSTOM!r} reads your own files; pass `train_file`")
        return files
    named = [f"`{key}`" for key, value in files.items() if value is not None]
    if named:
        raise TaskError(
            f"{', '.join(named)} came with the task {task!r}, which has its own files; use the task {CUSTOM!r}"
        )
    return None


def data_folder(data_dir: PathLike | None, source: str = "auto") -> Path | None:
    """The data folder, or ``None`` for the hub.

    Raises:
        TaskError: files are asked for, but no folder is given.
    """
    if source == "hub":
        return None
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    if chosen is None and source == "files":
        raise TaskError(f"`source=files` was given, but no data folder; pass `data_dir` or set {DATA_VARIABLE}")
    return None if chosen is None else Path(chosen).expanduser()


def _load_topics(source: str) -> TaskData:
    if source == "hub":
        raise TaskError("the task 'topics' comes with the package and is not on the hub; leave `source` at 'auto'")
    with resources.as_file(resources.files("sparsepeft.tasks") / "topics") as folder:
        if not folder.is_dir():
            raise TaskError(f"the built-in sample is missing at {folder}; the installation is incomplete, reinstall it")
        paths = {part: folder / f"{part}.jsonl" for part in ("train", "validation", "test")}
        spec, columns = SPECS["topics"], Columns(("text",), "label")
        sets = {part: load_labelled(path, spec, columns, find_format(path))[0] for part, path in paths.items()}
        sums = {path.name: sha256(path) for path in paths.values()}
        return TaskData(spec, **sets, source="topics (built in)", fingerprints=sums)
