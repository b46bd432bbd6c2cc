"""Reading files row by row, with errors that name the file and line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsepeft.errors import TaskError
from sparsepeft.rows.conll import read_sentences
from sparsepeft.rows.decoding import check_size, known_encoding, lines, marked_encoding
from sparsepeft.rows.formats import DELIMITERS, FileFormat, find_format, records, split_raw, table_lines
from sparsepeft.rows.parquet import read_records


class Row(NamedTuple):
    """One record and the line of the file on which it starts; its number in a JSON list and in parquet, from 1."""

    line: int
    values: dict[str, Any]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Give the first of ``names`` that exists in ``folder``, as it is or with ``.gz``."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def require_file(folder: Path, names: Sequence[str]) -> Path:
    """`find_file`, or a `TaskError` that says what was looked for."""
    path = find_file(folder, names)
    if path is None:
        expected = " or ".join(names)
        raise TaskError(
            f"{folder} has no {expected} (nor that with .gz); put the file there or choose another data folder"
        )
    return path


def sha256(path: Path) -> str:
    """``"sha256:<hex>"`` of the file as it lies on the disk."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' names without their folders; with the last folder and a number where two have the same."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{path.parent.name}/{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def read_rows(
    path: Path,
    file_format: FileFormat | None = None,
    *,
    required: Collection[str] = (),
    header: Sequence[str] | None = None,
    allow_short: bool = False,
    streamed: bool = False,
) -> Iterator[Row]:
    """Read a file row by row. Empty lines are skipped.

    Args:
        path: CSV, TSV, JSON or CoNLL, or that with .gz, or parquet.
        file_format: how it is written; None asks :func:`sparsepeft.rows.formats.find_format`, but guesses no encoding,
            as nobody would see the note on it.
        required: columns that must be there.
        header: column names where a raw TSV file may lack its header line.
        allow_short: let raw TSV rows lack fields at their end (official QQP); such rows lack those keys.
        streamed: the caller holds no rows in memory: the file may have any size, and no rows.

    Raises:
        TaskError: no such file, unreadable, empty, without a required column, or a malformed row.
    """
    path = Path(path)
    if not streamed:
        check_size(path)
    form = file_format or find_format(path, may_guess=False)
    if form.kind == "parquet":
        rows = _parquet_rows(path, required)
    elif form.kind in ("json", "jsonl"):
        rows = _json_rows(path, form, required)
    elif form.kind == "conll":
        rows = _sentences(path, form, required)
    else:
        rows = _table_rows(path, form, required, header, allow_short)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty and not streamed:
        raise TaskError(f"{path} has no rows; expected at least one example in it")


def read_header(path: Path, file_format: FileFormat) -> list[str]:
    """The columns of a CSV or TSV file, also of one without rows; none where not even these are there.

    Raises:
        TaskError: it cannot be read, or has two columns of one name.
    """
    fields = _quoted_fields if file_format.is_quoted else _raw_fields
    _, names = next(iter(fields(path, file_format)), (0, []))
    columns = [name.strip() for name in names]
    check_columns(path, columns)
    return columns


def read_text(path: Path, encoding: str | None = None) -> str:
    """A file of plain text, or that with .gz, as it is.

    Args:
        encoding: a name that Python knows; None is UTF-8, or what a byte order mark says.

    Raises:
        TaskError: no such file, unreadable, or in another encoding.
    """
    path = Path(path)
    check_size(path)
    known = marked_encoding(path) if encoding is None else known_encoding(encoding)
    return "".join(line for _, line in lines(path, known))


def check_text(where: str, text: str) -> None:
    """See that a text can be encoded; an escape in JSON may give half of a surrogate pair.

    Raises:
        TaskError: it cannot.
    """
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise TaskError(f"{where} has half of a surrogate pair; expected text, correct the row")


def _table_rows(
    path: Path, form: FileFormat, required: Collection[str], header: Sequence[str] | None, allow_short: bool
) -> Iterator[Row]:
    columns: list[str] | None = None
    filled = set[int]()
    for number, fields in _quoted_fields(path, form) if form.is_quoted else _raw_fields(path, form):
        if columns is None:
            columns = [name.strip() for name in fields] if header is None else list(header)
            check_columns(path, columns, required)
            if header is None or fields == columns:
                continue
        if len(fields) != len(columns) and not (allow_short and len(fields) < len(columns)):
            raise TaskError(
                f"{path}:{number}: expected {len(columns)} fields as in the header, found {len(fields)}; correct the "
                "row"
            )
        values = dict(zip(columns, fields, strict=False))
        if columns.count("") > 1:
            values[""] = _nameless(f"{path}:{number}", columns, fields, filled)
        yield Row(number, values)


def _nameless(where: str, columns: list[str], fields: list[str], filled: set[int]) -> str:
    """The one value in columns without a name; spreadsheets write such columns where nothing is.

    Args:
        where: the row is, for messages.
        columns, fields: of the row.
        filled: numbers of the columns without a name that have a value in some row so far; changed.

    Raises:
        TaskError: two columns have values.
    """
    found = {number: field for number, field in enumerate(fields, 1) if field and not columns[number - 1]}
    filled.update(found)
    if len(filled) > 1:
        numbers = " and ".join(map(str, sorted(filled)))
        raise TaskError(
            f"{where}: columns {numbers} have values, but no name in the header; give them names in the header"
        )
    return "".join(found.values())


def _raw_fields(path: Path, form: FileFormat) -> Iterator[tuple[int, list[str]]]:
    for number, line in table_lines(path, form.encoding):
        if fields := split_raw(line, form.delimiter):
            yield number, fields


def _quoted_fields(path: Path, form: FileFormat) -> Iterator[tuple[int, list[str]]]:
    reader = records((line for _, line in table_lines(path, form.encoding)), form.delimiter)
    start = 1
    try:
        for fields in reader:
            number, start = start, reader.line_num + 1
            if fields:
                yield number, fields
    except csv.Error as error:
        name = DELIMITERS.get(form.delimiter, repr(form.delimiter))
        raise TaskError(
            f'{path}:{start}: malformed CSV ({error}); expected fields separated by a {name} and quoted with "; '
            "correct the row, or use TSV or JSONL"
        ) from error


def _json_rows(path: Path, form: FileFormat, required: Collection[str]) -> Iterator[Row]:
    """The objects in a list, or one a line."""
    numbered: Iterable[tuple[int, Any]]
    if form.kind == "json":
        content = "".join(line for _, line in lines(path, form.encoding))
        numbered = enumerate(_parse(str(path), content, "a list of objects"), start=1)
    else:
        numbered = (
            (number, _parse(f"{path}:{number}", line, "one object per line"))
            for number, line in lines(path, form.encoding)
            if line.strip()
        )
    for number, values in numbered:
        if not isinstance(values, dict):
            raise TaskError(
                f"{path}:{number}: found a JSON {type(values).__name__}; expected one object per row, "
                'such as {"text": "...", "label": "..."}'
            )
        check_columns(Path(f"{path}:{number}"), list(values), required)
        yield Row(number, values)


def _parse(where: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
        raise TaskError(f"{where}: not JSON ({error}); expected {expected}, correct it") from error


def check_columns(path: Path, columns: list[str], required: Collection[str] = ()) -> None:
    """See that a file has the columns that it must have, and none twice.

    Raises:
        TaskError: it lacks one, or two have one name.
    """
    missing = [name for name in required if name not in columns]
    if missing:
        raise TaskError(
            f"{path}: no column {', '.join(map(repr, missing))}; the columns found are "
            f"{', '.join(map(repr, columns))}; correct the header or name another column"
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise TaskError(f"{path}: column {', '.join(map(repr, twice))} occurs twice in the header; rename one of them")


def _parquet_rows(path: Path, required: Collection[str]) -> Iterator[Row]:
    for number, values in enumerate(read_records(path), start=1):
        if number == 1:
            check_columns(path, list(values), required)
        yield Row(number, values)


def _sentences(path: Path, form: FileFormat, required: Collection[str]) -> Iterator[Row]:
    """The sentences of a file with a token a line."""
    for number, values in read_sentences(path, form.encoding):
        check_columns(Path(f"{path}:{number}"), list(values), required)
        yield Row(number, values)
