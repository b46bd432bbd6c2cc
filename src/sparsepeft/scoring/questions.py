"""What a run is asked: rows of a table, or lines as they come."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparsepeft.errors import TaskError, UserError
from sparsepeft.rows.decoding import UTF8, is_gzipped, known_encoding, line_end, unpacked_name
from sparsepeft.rows.formats import FileFormat, check_used, encoding_of, find_format
from sparsepeft.rows.reading import read_header, read_rows
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import TOKENS, Columns, choose_text_columns

logger = logging.getLogger(__name__)

_PREFIX = "predicted_"  # before names that the row has already
_LINES = (".txt", ".jsonl")  # of which each line is answered as it comes, whatever the others are
_OBJECT = re.compile(r'\s*(\{\s*["}]|\[\s*["\[{])')  # how a line begins that is meant as JSON, even if it is none


class Asked(Protocol):
    """What questions are read for: a :class:`~sparsepeft.inference.Predictor`, or several tasks that read the same."""

    @property
    def spec(self) -> TaskSpec:
        """The task."""

    @property
    def columns(self) -> Columns | None:
        """What texts and label were called in the training file; None where that was none of the user's own."""


@dataclass(frozen=True)
class TableOptions:
    """What the caller says about a file with rows; None finds out.

    Attributes:
        text_column, text_pair_column, label_column: names of columns; by default what they were called in training.
            Several label columns, in a list or with commas between them, hold 0 and 1.
        delimiter, encoding: of the file, see :func:`sparsepeft.rows.formats.find_format`.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | Sequence[str] | None = None
    delimiter: str | None = None
    encoding: str | None = None

    def format_of(self, path: Path) -> FileFormat:
        """How a file is written, see :func:`sparsepeft.rows.formats.find_format`.

        Raises:
            TaskError: it cannot be told, or a delimiter or encoding was given for a file that has none.
        """
        found = find_format(path, self.delimiter, self.encoding)
        check_used({path: found}, self.delimiter, self.encoding)
        return found


@dataclass(frozen=True)
class Question:
    """One input.

    Attributes:
        texts: a text, a list of them, or a dictionary of ``tokens``, as the file has it: it may be no text.
        columns: all columns of its row, by name; empty for a line of plain text.
        error: why there is no input; None where there is one.
        added: what goes beside the columns with the answer: the ``text`` of a list of tokens, in which entities are.
    """

    texts: Any
    columns: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    added: dict[str, Any] = field(default_factory=dict)


def read_questions(path: Path, asked: Asked, table: TableOptions = TableOptions()) -> Iterator[Question]:
    """The lines of a .txt or .jsonl file, or the rows of any other that training reads, also with .gz.

    A .txt file that begins with the names of the texts' columns, as one that was trained on does, is a table. A table
    that is malformed anywhere is refused before the first row is asked: one field too many often shifts all that
    follow. A line that cannot be read is a question with an error.

    Args:
        asked: of the run that is asked.
        table: how to read it.

    Raises:
        UserError: the file cannot be read, or it cannot be told which columns are the texts.
    """
    if not path.exists():
        raise UserError(f"The file {path} does not exist; pass an existing one as `file`.")
    if path.is_file() and (not unpacked_name(path).endswith(_LINES) or _is_table(path, asked, table)):
        return _read_table(path, asked, table)
    if table.delimiter is not None:
        raise UserError(
            f"`delimiter={table.delimiter}` goes with files whose names end in .csv or .tsv, but {path} has lines; "
            "leave it out."
        )
    return _read_file(path, asked, table)


def read_lines(
    lines: Iterable[str], asked: Asked, table: TableOptions = TableOptions(), *, must_be_json: bool = False
) -> Iterator[Question]:
    """A question a line, so that line N of the answers belongs to line N of what was asked.

    A line is plain text (with a tab between the texts of a pair) or JSON: a text, a list of two, or an object with the
    text's column.

    Args:
        lines: with or without their ends.
        asked: of the run that is asked.
        table: names of the columns of objects.
        must_be_json: no line is plain text; empty ones are passed over.
    """
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # text columns by all columns

    def question(number: int, line: str) -> Question:
        value: Any = line
        if must_be_json or line.lstrip()[:1] in ("{", "[", '"'):
            try:
                value = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                if must_be_json or _OBJECT.match(line):
                    raise UserError(f"Line {number} is not JSON ({error}); correct it.") from error
        if value is line and len(asked.spec.text_columns) == 2:
            value = line.split("\t")
        if not isinstance(value, dict):
            return Question(value)
        keys = tuple(value)
        if keys not in known:
            known[keys] = text_columns(Path(f"line {number}"), list(keys), asked, table, any_name=False)
        return as_question([value[name] for name in known[keys]], value, asked)

    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if must_be_json and not line.strip():
            continue
        try:
            yield question(number, line)
        except UserError as error:
            yield Question(None, error=str(error))


def _is_table(path: Path, asked: Asked, table: TableOptions) -> bool:
    """Whether a file of lines is a table with a header, as training reads a .txt file."""
    if not unpacked_name(path).endswith(".txt"):
        return False
    if table.delimiter is not None:
        return True
    named = [name for name in (table.text_column, table.text_pair_column) if name is not None]
    try:
        header = read_header(path, table.format_of(path))
    except TaskError:
        return False
    return len(header) > 1 and set(named or _trained(asked)) <= set(header)


def _read_table(path: Path, asked: Asked, table: TableOptions) -> Iterator[Question]:
    file_format = table.format_of(path)
    for note in file_format.notes:
        logger.warning("%s", note)
    header = list(next(iter(read_rows(path, file_format))).values)
    names = text_columns(path, header, asked, table)
    for _ in read_rows(path, file_format, required=names):
        pass
    return (
        as_question([row.values.get(name) for name in names], row.values, asked)
        for row in read_rows(path, file_format, required=names)
    )


def _read_file(path: Path, asked: Asked, table: TableOptions) -> Iterator[Question]:
    encoding = encoding_of_lines(path, table)
    opened: Any = gzip.open if is_gzipped(path) else open
    end = "\n"
    if path.is_file():  # a pipe is read once
        with contextlib.suppress(TaskError):  # of a damaged file, which is told where it is read
            end = line_end(path, encoding)
    try:
        # What is not of that encoding becomes half of a surrogate pair, which the line's answer complains of.
        with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline=end) as stream:
            must_be_json = unpacked_name(path).endswith((".jsonl", ".json"))
            yield from read_lines(stream, asked, table, must_be_json=must_be_json)
    except (OSError, EOFError, LookupError) as error:
        raise UserError(f"{path} cannot be read ({error}); pass another `file`, or its `encoding`.") from error


def encoding_of_lines(path: Path, table: TableOptions) -> str:
    """A file's encoding, as training finds it, with a note on one that was guessed.

    UTF-8 for a pipe, which is read once, and for a damaged file, whose lines then say so.

    Raises:
        TaskError: the caller says one that Python does not know.
    """
    if table.encoding is not None or not path.is_file():
        return known_encoding(table.encoding or UTF8)
    try:
        found, notes = encoding_of(path)
    except TaskError:
        return UTF8
    for note in notes:
        logger.warning("%s", note)
    return found


def _trained(asked: Asked) -> tuple[str, ...]:
    """What the texts' columns were called in training."""
    return asked.columns.texts if asked.columns is not None else asked.spec.text_columns


def text_columns(
    path: Path, header: list[str], asked: Asked, table: TableOptions, any_name: bool = True
) -> tuple[str, ...]:
    """The columns that a question's texts are in, of those that a file has.

    Args:
        path, header: of the file.
        asked: what the question is for.
        table: names of columns, where the caller gives some.
        any_name: a column that is the only one is the text, whatever its name.

    Raises:
        UserError: it cannot be told which they are.
    """
    trained = _trained(asked)
    number = len(asked.spec.text_columns)
    if asked.spec.labels_tokens and number == 1 and table.text_column is None:
        trained = tuple(name for name in (*trained, *TOKENS) if name in header)[:1]
    named = (table.text_column, table.text_pair_column)
    return choose_text_columns(path, header, number, *named, trained, any_name=any_name)


def as_question(texts: list[Any], columns: dict[str, Any], asked: Asked) -> Question:
    """A row's question; of a list of tokens the text is added, since that is where answers say that entities are."""
    first = texts[0]
    if asked.spec.labels_tokens and isinstance(first, list):
        return Question({"tokens": first}, columns, added={"text": " ".join(map(str, first))})
    return Question(first if len(texts) == 1 else texts, columns)


def beside(columns: Mapping[str, Any], added: Mapping[str, Any], taken: Container[str] = ()) -> dict[str, Any]:
    """Columns and what is added to them.

    A name that is a column already (often the truth) stays the column's; ours is then called ``predicted_label``.

    Args:
        columns: of the row.
        added: by name.
        taken: columns that other rows have, so that a name means the same in all of them.
    """
    row = dict(columns)
    for name, value in added.items():
        while name in columns or name in taken:
            name = _PREFIX + name
        row[name] = value
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
