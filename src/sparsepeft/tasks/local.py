"""Your own files, plain or gzipped, for classes, several labels at once, or values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict

from sparsepeft.errors import TaskError
from sparsepeft.rows.formats import FileFormat, check_used, find_format
from sparsepeft.rows.reading import check_text, distinct_names, read_rows, sha256
from sparsepeft.tasks.columns import Columns, choose_columns, choose_token_columns, holds_tokens
from sparsepeft.tasks.indicators import Indicators, indicator_columns, read_indicators
from sparsepeft.tasks.labels import SINGLE, TOKENS, Label, LabelReader, problem_type_of, quoted, read_label
from sparsepeft.tasks.spec import ENTITY_METRICS, TaskData, TaskSpec, build_dataset
from sparsepeft.tasks.splits import split_train
from sparsepeft.tasks.tags import TagReader, entity_types, read_sentence

if TYPE_CHECKING:
    from datasets import Dataset

EPOCHS: Final = 10
HELD_OUT: Final = 0.1
FEW_ROWS: Final = 50  # with so many, half of them right, one standard error of the accuracy is 7 points
LEAST_ROWS: Final = 3  # without a validation file: one to train on, one to choose a checkpoint by, one to score


PathLike = str | os.PathLike[str]


class FileOptions(TypedDict, total=False):
    """Own files, and how to read them.

    Attributes:
        train_file, validation_file, test_file: .csv, .tsv, .jsonl, .json or .conll (also .bio, .iob or .iob2), all
            also with .gz, or .parquet.
        text_column, text_pair_column, label_column: their columns; detected where only one reading is possible. Several
            label columns, in a list or with commas between them, hold 0 and 1 and are called like the labels.
        problem_type: what the labels are: ``"regression"``, ``"single_label"``, ``"multi_label"``, or transformers'
            longer names, or ``"token_classification"``; by default lists of tokens and tags mean that, other lists
            several labels, numbers that are not whole regression, all else classes.
        delimiter: between the fields of CSV or TSV files: a character, or ``"tab"``, ``"semicolon"``, ...; looked for
            by default.
        encoding: as Python names it; by default UTF-8, or what a byte order mark says, else cp1252 with a note.
    """

    train_file: PathLike | None
    validation_file: PathLike | None
    test_file: PathLike | None
    text_column: str | None
    text_pair_column: str | None
    label_column: str | Sequence[str] | None
    problem_type: str | None
    delimiter: str | None
    encoding: str | None


class Example(NamedTuple):
    """The texts and the label, or the tokens and their tags, as the file has them, and the line."""

    line: int
    texts: tuple[Any, ...]
    label: Label


class LocalFiles:
    """Own files as the options say; of their content, the first rows are read, and more only if labels are not found.

    Attributes:
        paths: by part: train, validation, test.
        formats: how each is written.
        header: columns of the training file.
        columns: those that are taken; the other files must have them too, but for files of tokens, which may have
            others of the usual names.
        labels_tokens: the rows are lists of tokens with a tag for each.

    Raises:
        TaskError: a file is missing or cannot be read, a delimiter was given for files that have none, or a column
            cannot be told or is missing.
    """

    def __init__(self, options: FileOptions) -> None:
        self.problem_type = problem_type_of(options.get("problem_type"))
        given: dict[str, Any] = {part: options.get(f"{part}_file") for part in ("train", "validation", "test")}
        self.paths = {part: Path(path).expanduser() for part, path in given.items() if path is not None}
        delimiter, encoding = options.get("delimiter"), options.get("encoding")
        self.formats = {part: find_format(path, delimiter, encoding) for part, path in self.paths.items()}
        check_used({self.paths[part]: found for part, found in self.formats.items()}, delimiter, encoding)
        first = next(iter(read_rows(self.paths["train"], self.formats["train"]))).values
        self.header = list(first)
        names = options.get("text_column"), options.get("text_pair_column"), options.get("label_column")
        self.labels_tokens = self._labels_tokens(first, names[0], names[2])
        if self.labels_tokens:
            self.columns = self._token_columns("train", self.header, names)
        else:
            self.columns = choose_columns(self.paths["train"], self.header, *names, self._find_indicators)
        self._notes = [] if names[2] else _on_found(self.columns)
        self._columns_of = {part: self._columns_in(part, names) for part in self.paths}

    def _labels_tokens(self, first: dict[str, Any], text: str | None, label: str | Sequence[str] | None) -> bool:
        path, kind, given = self.paths["train"], self.formats["train"].kind, self.problem_type
        if kind == "conll" and given not in (None, TOKENS):
            raise TaskError(f"`problem_type={given}` was given, but {path} has tokens with tags; leave it out")
        if kind in ("csv", "tsv") and given == TOKENS:
            raise TaskError(
                f"`problem_type={given}` was given, but {path} is a table of texts; pass a .conll file with a token "
                "and its tag on each line, or JSONL or parquet with lists of them"
            )
        return given == TOKENS or kind == "conll" or (given is None and holds_tokens(first, text, label))

    def _columns_in(self, part: str, names: tuple[Any, Any, Any]) -> Columns:
        path, file_format = self.paths[part], self.formats[part]
        if not self.labels_tokens:
            next(iter(read_rows(path, file_format, required=self.columns.all)))
            return self.columns
        header = list(next(iter(read_rows(path, file_format))).values)
        return self._token_columns(part, header, names, self.columns)

    def _token_columns(
        self, part: str, header: list[str], names: tuple[Any, Any, Any], trained: Columns | None = None
    ) -> Columns:
        """The columns of a file of tokens; beside other files a CoNLL file has its own, whatever the caller names."""
        kinds = {file_format.kind for file_format in self.formats.values()}
        is_named = self.formats[part].kind != "conll" or kinds == {"conll"}
        text, pair, label = names if is_named else (None, None, None)
        return choose_token_columns(self.paths[part], header, text, pair, label, trained)

    def _find_indicators(self) -> Indicators:
        return indicator_columns(read_rows(self.paths["train"], self.formats["train"]))

    def read(self, name: str) -> tuple[TaskSpec, dict[str, list[tuple[Any, ...]]], list[str]]:
        """Read them all; the training file decides the kind of problem and the label names.

        Returns:
            The task of that name, rows ``(text[, text_pair], label)`` by part, and what a reader of the results must
            know of the files.

        Raises:
            TaskError: something in them cannot be used.
        """
        read = _read_sentences if self.labels_tokens else _read
        examples = {
            part: list(read(path, self.formats[part], self._columns_of[part])) for part, path in self.paths.items()
        }
        train, labels = self.paths["train"], _labels(examples["train"])
        reader: LabelReader | TagReader
        if self.labels_tokens:
            reader = TagReader.from_training(train, labels)
        elif isinstance(self.columns.label, str):
            reader = LabelReader.from_training(train, labels, self.problem_type)
        else:
            reader = LabelReader.for_columns(self.columns.label, labels, self.problem_type)
        rows, found = {}, list(reader.notes)
        for part, path in self.paths.items():
            if isinstance(reader, TagReader) and part != "train" and entity_types(reader.names):
                reader = reader.of_file(path, _labels(examples[part]))
                found += reader.notes
            rows[part] = _rows(path, examples[part], reader)
        if "validation" not in rows and len(rows["train"]) < LEAST_ROWS:
            raise TaskError(
                f"{train} has {len(rows['train'])} row(s); expected at least {LEAST_ROWS} (one to train on, "
                "one to choose a checkpoint by, one to score), add examples"
            )
        notes = [note for file_format in self.formats.values() for note in file_format.notes]
        return _spec(name, self.columns, reader), rows, [*notes, *self._notes, *found]

    def describe(self) -> dict[str, Any]:
        """How they are written and which columns are taken, in what JSON can hold: ``files`` and ``columns``."""
        return {
            "files": {part: {"name": path.name, **self.formats[part].describe()} for part, path in self.paths.items()},
            "columns": {
                "text": list(self.columns.texts),
                "label": self.columns.label if isinstance(self.columns.label, str) else list(self.columns.label),
                "found": self.header,
            },
        }


def load_local(name: str, options: FileOptions, seed: int) -> TaskData:
    """Load a task from local files."""
    files = LocalFiles(options)
    paths = files.paths
    spec, rows_of, notes = files.read(name)
    sets = {part: build_dataset(spec, rows) for part, rows in rows_of.items()}
    sums = {part: sha256(path) for part, path in paths.items()}
    notes += [
        f"{path.name} has the same content as the training file: its scores say nothing about new texts"
        for part, path in paths.items()
        if part != "train" and sums[part] == sums["train"]
    ]
    trained = {row[:-1] for row in rows_of["train"]}
    notes += [
        f"{num_known:,} of {len(rows):,} rows of {paths[part].name} are in the training file, too: their scores say "
        "nothing about new texts"
        for part, rows in rows_of.items()
        if part != "train" and sums[part] != sums["train"] and (num_known := sum(row[:-1] in trained for row in rows))
    ]
    if "validation" not in sets:
        num_rows = len(sets["train"])
        sets["train"], sets["validation"] = split_train(sets["train"], spec, HELD_OUT, seed)
        kind = "seeded" if spec.label_names is None else "seeded, stratified"
        notes.append(
            f"no validation file: {len(sets['validation']):,} of {num_rows:,} training rows "
            f"(a {kind} tenth, seed {seed}) are held out as validation"
        )
        left = _texts(sets["train"], spec)
        if num_known := sum(texts in left for texts in _texts(sets["validation"], spec).elements()):
            notes.append(
                f"{num_known:,} of the rows held out have the texts of rows that are trained on: their scores say "
                "nothing about new texts; leave each text once"
            )
    if spec.problem_type == SINGLE and spec.label_names is not None:
        seen = set(sets["validation"]["label"][:])
        missing = [label for index, label in enumerate(spec.label_names) if index not in seen]
        if missing:
            notes.append(f"{len(missing)} of {spec.num_labels} labels have no validation row: {quoted(missing, 5)}")
    notes += [
        f"the {part} part has {len(sets[part])} row(s): scores on fewer than {FEW_ROWS} mean little"
        for part in ("validation", "test")
        if part in sets and len(sets[part]) < FEW_ROWS
    ]
    return TaskData(
        spec,
        sets["train"],
        sets["validation"],
        test=sets.get("test"),
        notes=tuple(f"{name}: {note}" for note in notes),
        source=paths["train"].name,
        fingerprints=dict(zip(distinct_names([*paths.values()]), sums.values(), strict=True)),
        drawn=() if "validation" in paths else ("validation",),
        columns=files.columns,
    )


def _texts(rows: Dataset, spec: TaskSpec) -> Counter[tuple[Any, ...]]:
    """How often each text, pair or list of tokens is among the rows."""
    columns = (rows[name][:] for name in spec.text_columns)
    return Counter(
        tuple(text if isinstance(text, str) else tuple(text) for text in row) for row in zip(*columns, strict=True)
    )


def load_labelled(
    path: Path, spec: TaskSpec, columns: Columns, file_format: FileFormat
) -> tuple[Dataset, tuple[str, ...]]:
    """Rows of a file for a task that was trained before, whose labels are the ones that are valid, and notes.

    Raises:
        TaskError: the file cannot be read, or has labels that training never saw.
    """
    examples = list((_read_sentences if spec.labels_tokens else _read)(path, file_format, columns))
    labels = _labels(examples)
    reader = TagReader.for_task(path, spec, labels) if spec.labels_tokens else LabelReader.for_task(spec, labels)
    return build_dataset(spec, _rows(path, examples, reader)), reader.notes


def _read(path: Path, file_format: FileFormat, columns: Columns) -> Iterator[Example]:
    for row in read_rows(path, file_format, required=columns.all):
        where = f"{path}:{row.line}"
        texts = tuple(row.values[name] for name in columns.texts)
        for name, text in zip(columns.texts, texts, strict=True):
            if not isinstance(text, str):
                raise TaskError(f"{where}: {name} is {text!r}; expected a text (it may be empty), correct the row")
            check_text(f"{where}: {name}", text)
        yield Example(row.line, texts, _label(where, row.values, columns))


def _label(where: str, values: Mapping[str, Any], columns: Columns) -> Label:
    if not isinstance(columns.label, str):
        return read_indicators(where, {name: values[name] for name in columns.label})
    label = read_label(f"{where}: {columns.label}", values[columns.label])
    for part in (label,) if isinstance(label, str) else label:
        check_text(f"{where}: {columns.label}", part)
    return label


def _on_found(columns: Columns) -> list[str]:
    """A note on label columns that nobody named."""
    if isinstance(columns.label, str):
        return []
    return [
        f"the columns {quoted(columns.label, 5)} hold only 0 and 1 and were taken for labels, of which any may hold; "
        "if they are not, name the one label column with `label_column`"
    ]


def _read_sentences(path: Path, file_format: FileFormat, columns: Columns) -> Iterator[Example]:
    for row in read_rows(path, file_format, required=columns.all):
        where, names = f"{path}:{row.line}", (columns.texts[0], columns.labels[0])
        tokens, tags = read_sentence(where, row.values[names[0]], row.values[names[1]], names)
        for text in (*tokens, *tags):
            check_text(where, text)
        yield Example(row.line, (tokens,), tags)


def _labels(examples: list[Example]) -> list[tuple[int, Any]]:
    return [(example.line, example.label) for example in examples]


def _rows(path: Path, examples: list[Example], reader: LabelReader | TagReader) -> list[tuple[Any, ...]]:
    values = reader.read(path, _labels(examples))
    return [(*example.texts, value) for example, value in zip(examples, values, strict=True)]


def _spec(name: str, columns: Columns, reader: LabelReader | TagReader) -> TaskSpec:
    if isinstance(reader, TagReader):
        if entity_types(reader.names):
            return TaskSpec(name, ("text",), reader.names, ENTITY_METRICS, "f1", EPOCHS, labels_tokens=True)
        of_tokens = ("accuracy", "macro_f1")
        return TaskSpec(name, ("text",), reader.names, of_tokens, "accuracy", EPOCHS, labels_tokens=True)
    texts = ("text", "text_pair")[: len(columns.texts)]
    if reader.names is None:
        return TaskSpec(name, texts, None, ("pearson", "spearman", "mae", "rmse"), "pearson_spearman", EPOCHS)
    if reader.multi_label:
        metrics = ("micro_f1", "macro_f1", "subset_accuracy")
        return TaskSpec(name, texts, reader.names, metrics, "micro_f1", EPOCHS, multi_label=True)
    return TaskSpec(name, texts, reader.names, ("accuracy", "macro_f1"), "accuracy", EPOCHS)
