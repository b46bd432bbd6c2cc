"""`load_task`: a task by name from its files, from the hub, or from what the package brings."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from sparsepeft.tasks.errors import TaskError
from sparsepeft.tasks.local import Options, load_fixed, load_local
from sparsepeft.tasks.registry import CUSTOM, SPECS, canonical_name
from sparsepeft.tasks.spec import TaskData

DATA_VARIABLE: Final = "SPARSEPEFT_DATA"
SOURCES: Final = ("auto", "files", "hub")
PathLike = str | os.PathLike[str]


def load_task(
    name: str,
    *,
    data_dir: PathLike | None = None,
    seed: int = 42,
    train_file: PathLike | None = None,
    validation_file: PathLike | None = None,
    test_file: PathLike | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    problem_type: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    source: Literal["auto", "files", "hub"] = "auto",
) -> TaskData:
    """Load a task's training, validation and (where labels are public) test sets.

    Example:
        >>> load_task("topics").spec.label_names
        ('business', 'health', 'science', 'sport', 'travel')
        >>> load_task("rte", data_dir="data")                            # data/rte/ or data/RTE/
        >>> load_task("custom", train_file="train.csv", label_column="mood")

    Args:
        name: one of `task_names`, or another spelling of it such as ``"SST-2"``.
        data_dir: folder with the files of GLUE and BBC News; default: the variable ``SPARSEPEFT_DATA``.
        seed: decides the split of BBC News and the validation part of own files without a validation file.
        train_file, validation_file, test_file: own files (.csv, .tsv, .jsonl, .json, also with .gz, or .parquet), for
            ``"custom"``.
        text_column, text_pair_column, label_column: their columns; detected where only one reading is possible.
        problem_type: what own labels are: ``"regression"``, ``"single_label"``, ``"multi_label"``, or transformers'
            longer names; by default lists mean several labels, numbers that are not whole regression, all else classes.
        delimiter: between the fields of own CSV or TSV files: a character, or ``"tab"``, ``"semicolon"``, ...; looked
            for by default.
        encoding: of own files, as Python names it; by default UTF-8, or what a byte order mark says, else cp1252 with a
            note.
        source: ``"files"``, ``"hub"``, or ``"auto"``: files if there is a data folder, else the hub.

    Raises:
        TaskError: unknown task, missing or malformed files, labels that do not fit, or an unreachable hub.
    """
    task = canonical_name(name)
    if source not in SOURCES:
        raise TaskError(f"`source={source}` was given; expected one of {', '.join(SOURCES)}")
    own = {
        "train_file": train_file,
        "validation_file": validation_file,
        "test_file": test_file,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "problem_type": problem_type,
        "delimiter": delimiter,
        "encoding": encoding,
    }
    options = own_options(task, own)
    if options is not None:
        if source == "hub":
            raise TaskError(f"the task {CUSTOM!r} reads your own files; leave `source` at 'auto' or 'files'")
        return load_local(CUSTOM, options, seed)
    if task == "topics":
        return _load_topics(source)
    return _load_public(task, data_folder(data_dir, source), seed)


def own_options(task: str, own: dict[str, Any]) -> Options | None:
    """What was said about own files; None for a task that has its own.

    Raises:
        TaskError: they are for such a task, or there is no training file.
    """
    if task == CUSTOM:
        if own["train_file"] is None:
            raise TaskError(f"the task {CUSTOM!r} reads your own files; pass `train_file`")
        paths = {
            key: None if own[key] is None else Path(own[key]).expanduser()
            for key in ("train_file", "validation_file", "test_file")
        }
        return Options(**(own | paths))
    given = [f"`{key}`" for key, value in own.items() if value is not None]
    if given:
        raise TaskError(
            f"{', '.join(given)} came with the task {task!r}, which has its own files; use the task {CUSTOM!r}"
        )
    return None


def _load_public(task: str, folder: Path | None, seed: int) -> TaskData:
    spec = SPECS[task]
    if task == "bbc-news":
        from sparsepeft.tasks.bbc import load_bbc_files, load_bbc_hub

        return load_bbc_hub(spec, seed) if folder is None else load_bbc_files(spec, folder, seed)
    from sparsepeft.tasks.glue import load_glue_files, load_glue_hub

    return load_glue_hub(spec) if folder is None else load_glue_files(spec, folder)


def data_folder(data_dir: PathLike | None, source: str = "auto") -> Path | None:
    """Give the data folder, or ``None`` for the hub.

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
        return load_fixed(SPECS["topics"], paths, source="topics (built in)")
