"""Readers of TSV, CSV and JSONL, plain or gzipped, that name the file and line of whatever is wrong."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from sparsepeft.tasks.errors import TaskError

FORMATS: Final = (".tsv", ".csv", ".jsonl")
_LONGEST_FIELD: Final = 2**31 - 1  # what a C long holds everywhere


class Row(NamedTuple):
    """One record and the line of the file on which it starts."""

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
        wanted = " or ".join(names)
        raise TaskError(
            f"{folder} has no {wanted} (nor that with .gz); put the file there or choose another data folder"
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
    *,
    required: Collection[str] = (),
    header: Sequence[str] | None = None,
    allow_short: bool = False,
) -> Iterator[Row]:
    """Read a file row by row; its name's ending (less ``.gz``) says the format.

    TSV is split on tabs without quoting: a ``"`` is a character. CSV follows the usual quoting. Encoding is UTF-8, with
    or without byte order mark. Empty lines are passed over.

    Args:
        path: a .tsv, .csv or .jsonl file, or that with .gz; .txt is read as TSV (official MRPC).
        required: columns that must be there.
        header: TSV column names where the file may lack its header line.
        allow_short: let TSV rows lack fields at their end (official QQP); such rows lack those keys.

    Raises:
        TaskError: no such file, unreadable, empty, without a required column, or a malformed row.
    """
    path = Path(path)
    kind = path.suffixes[-2:][0] if path.suffix == ".gz" else path.suffix
    if kind in (".tsv", ".txt"):
        rows = _tsv_rows(path, required, header, allow_short)
    elif kind == ".csv":
        rows = _csv_rows(path, required)
    elif kind == ".jsonl":
        rows = _jsonl_rows(path, required)
    else:
        raise TaskError(
            f"{path}: the ending says no known format; expected {', '.join(FORMATS)}, also with .gz; rename the file"
        )
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise TaskError(f"{path} has no rows; expected at least one example in it")


def read_text(path: Path) -> str:
    """A file of plain text, or that with .gz, as it is.

    Raises:
        TaskError: no such file, unreadable or not UTF-8.
    """
    return "".join(line for _, line in _lines(Path(path)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise TaskError(f"{path} {what}; expected a file with examples, check the path")
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path}: not UTF-8 text after line {number} ({error.reason}); convert the file to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: damaged gzip file ({error}); expected a whole .gz file, fetch it again") from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> TextIO:
    # newline="\n": only "\n" ends a line; a bare "\r" or U+2028 inside a sentence does not.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open("r", encoding="utf-8-sig", newline="\n")


def _tsv_rows(path: Path, required: Collection[str], header: Sequence[str] | None, allow_short: bool) -> Iterator[Row]:
    columns: list[str] | None = None
    for number, line in _lines(path):
        line = line.rstrip("\r\n")
        if not line:
            continue
        fields = line.split("\t")
        if columns is None:
            columns = fields if header is None else list(header)
            _check_columns(path, columns, required)
            if header is None or fields == columns:
                continue
        _check_width(path, number, fields, columns, allow_short)
        yield Row(number, dict(zip(columns, fields, strict=False)))


def _csv_rows(path: Path, required: Collection[str]) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)  # of the process, as csv has no other; its default is 128 KiB, a long document
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    columns: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            number, start = start, reader.line_num + 1
            if not fields:
                continue
            if columns is None:
                columns = fields
                _check_columns(path, columns, required)
                continue
            _check_width(path, number, fields, columns, allow_short=False)
            yield Row(number, dict(zip(columns, fields, strict=True)))
    except csv.Error as error:
        raise TaskError(
            f'{path}:{start}: malformed CSV ({error}); expected fields separated by commas and quoted with "; '
            "correct the row, or use TSV or JSONL"
        ) from error


def _jsonl_rows(path: Path, required: Collection[str]) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
            raise TaskError(f"{path}:{number}: not JSON ({error}); expected one object per line, correct it") from error
        if not isinstance(values, dict):
            raise TaskError(
                f"{path}:{number}: found a JSON {type(values).__name__}; expected one object per line, "
                'such as {"text": "...", "label": "..."}'
            )
        _check_columns(Path(f"{path}:{number}"), list(values), required)
        yield Row(number, values)


def check_text(where: str, text: str) -> None:
    """See that a text can be encoded; an escape in JSON may give half of a surrogate pair.

    Raises:
        TaskError: it cannot.
    """
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise TaskError(f"{where} has half of a surrogate pair; expected text, correct the row")


def _check_columns(path: Path, columns: list[str], required: Collection[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise TaskError(
            f"{path}: no column {', '.join(map(repr, missing))}; the columns found are "
            f"{', '.join(map(repr, columns))}; correct the header or name another column"
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise TaskError(f"{path}: column {', '.join(map(repr, twice))} occurs twice in the header; rename one of them")


def _check_width(path: Path, number: int, fields: list[str], columns: list[str], allow_short: bool) -> None:
    if len(fields) == len(columns) or (allow_short and len(fields) < len(columns)):
        return
    raise TaskError(
        f"{path}:{number}: expected {len(columns)} fields as in the header, found {len(fields)}; correct the row"
    )
