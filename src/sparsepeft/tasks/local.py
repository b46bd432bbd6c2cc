"""Your own files: CSV, TSV or JSONL, plain or gzipped, for classification or regression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sparsepeft.tasks.columns import Columns, choose_columns
from sparsepeft.tasks.errors import TaskError
from sparsepeft.tasks.files import check_text, distinct_names, read_rows, sha256
from sparsepeft.tasks.labels import LabelReader
from sparsepeft.tasks.spec import TaskData, TaskSpec, build_dataset
from sparsepeft.tasks.splits import split_train

if TYPE_CHECKING:
    from datasets import Dataset

EPOCHS: Final = 10
HELD_OUT: Final = 0.1


class Options(NamedTuple):
    """What the caller said about their files."""

    train_file: Path
    validation_file: Path | None = None
    test_file: Path | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    problem_type: str | None = None


class Example(NamedTuple):
    """The texts and the label as the file has them, and the line."""

    line: int
    texts: tuple[str, ...]
    label: str


def load_local(name: str, options: Options, seed: int) -> TaskData:
    """Load a task from local files; the training file decides columns, kind of problem and label names."""
    train_path = options.train_file
    first = next(iter(read_rows(train_path)))
    columns = choose_columns(
        train_path, list(first.values), options.text_column, options.text_pair_column, options.label_column
    )
    examples = _read(train_path, columns)
    reader = LabelReader.from_training(
        train_path, [(example.line, example.label) for example in examples], options.problem_type
    )
    spec = _spec(name, columns, reader)
    train = build_dataset(spec, _rows(train_path, examples, reader))
    notes = list(reader.notes)
    sets, paths = {}, [train_path]
    for part, path in (("validation", options.validation_file), ("test", options.test_file)):
        if path is not None:
            sets[part] = build_dataset(spec, _rows(path, _read(path, columns), reader))
            paths.append(path)
    sums = [sha256(path) for path in paths]
    notes += [
        f"{path.name} has the same content as the training file: its scores say nothing about new texts"
        for path, digest in zip(paths[1:], sums[1:], strict=True)
        if digest == sums[0]
    ]
    if "validation" not in sets:
        num_rows = len(train)
        train, sets["validation"] = split_train(train, spec, HELD_OUT, seed)
        kind = "seeded" if spec.label_names is None else "seeded, stratified"
        notes.append(
            f"no validation file: {len(sets['validation']):,} of {num_rows:,} training rows "
            f"(a {kind} tenth, seed {seed}) are held out as validation"
        )
    return TaskData(
        spec,
        train,
        sets["validation"],
        test=sets.get("test"),
        notes=tuple(f"{name}: {note}" for note in notes),
        source=train_path.name,
        fingerprints=dict(zip(distinct_names(paths), sums, strict=True)),
        drawn=() if options.validation_file else ("validation",),
        columns=columns,
    )


def load_labelled(path: Path, spec: TaskSpec, columns: Columns, **reading: Any) -> Dataset:
    """Rows of a file for a task that was trained before, whose labels are the ones that are valid.

    Args:
        path: of the file.
        spec: the task.
        columns: the file's.
        **reading: how to read it, see :func:`sparsepeft.tasks.files.read_rows`.

    Raises:
        TaskError: the file cannot be read, or has labels that training never saw.
    """
    reader = LabelReader(None) if spec.label_names is None else LabelReader.for_names(spec.label_names)
    return build_dataset(spec, _rows(path, _read(path, columns, **reading), reader))


def load_fixed(spec: TaskSpec, paths: dict[str, Path], source: str) -> TaskData:
    """Load train, validation and test files with the columns ``text`` and ``label`` for a known task."""
    columns = Columns(spec.text_columns, "label")
    reader = LabelReader.for_names(spec.label_names or ())
    sets = {part: build_dataset(spec, _rows(path, _read(path, columns), reader)) for part, path in paths.items()}
    sums = {path.name: sha256(path) for path in paths.values()}
    return TaskData(spec, sets["train"], sets["validation"], test=sets["test"], source=source, fingerprints=sums)


def _read(path: Path, columns: Columns, **reading: Any) -> list[Example]:
    examples = []
    for row in read_rows(path, required=(*columns.texts, columns.label), **reading):
        texts = tuple(row.values[name] for name in columns.texts)
        for name, text in zip(columns.texts, texts, strict=True):
            if not isinstance(text, str):
                raise TaskError(
                    f"{path}:{row.line}: {name} is {text!r}; expected a text (it may be empty), correct the row"
                )
            check_text(f"{path}:{row.line}: {name}", text)
        examples.append(Example(row.line, texts, _label_text(path, row.line, columns.label, row.values[columns.label])))
    return examples


def _label_text(path: Path, line: int, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, int | float) else value
    if text is None or (isinstance(text, str) and not text.strip()):
        raise TaskError(
            f"{path}:{line}: {column} is empty; expected a label in every row, fill it in or remove the row"
        )
    if not isinstance(text, str):
        raise TaskError(f"{path}:{line}: {column} is {value!r}; expected a text or a number, correct the row")
    check_text(f"{path}:{line}: {column}", text)
    return text.strip()


def _rows(path: Path, examples: list[Example], reader: LabelReader) -> list[tuple[Any, ...]]:
    values = reader.read(path, [(example.line, example.label) for example in examples])
    return [(*example.texts, value) for example, value in zip(examples, values, strict=True)]


def _spec(name: str, columns: Columns, reader: LabelReader) -> TaskSpec:
    texts = ("text", "text_pair")[: len(columns.texts)]
    if reader.names is None:
        return TaskSpec(name, texts, None, ("pearson", "spearman"), "pearson_spearman", EPOCHS)
    return TaskSpec(name, texts, reader.names, ("accuracy", "macro_f1"), "accuracy", EPOCHS)
