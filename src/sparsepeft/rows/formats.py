"""The format of a file with examples: from its suffix, and from its content where that is not enough."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.decoding import GUESS, UTF8, find_encoding, known_encoding, lines, unpacked_name

FORMATS: Final = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll")
DELIMITERS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_KINDS: Final = {
    **{ending: ending[1:] for ending in FORMATS},
    **{".tab": "tsv", ".txt": "tsv"},
    **dict.fromkeys((".bio", ".iob", ".iob2"), "conll"),
}
_SPREADSHEETS: Final = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".xml", ".numbers")
_NAMES: Final = {"parquet": "Parquet", "conll": "CoNLL"}  # that are no capitals
_LONGEST_FIELD: Final = 2**31 - 1  # what a C long holds everywhere
_SAMPLE: Final = 200  # lines that a delimiter is chosen by
_SAID: Final = re.compile(r'("?)sep=([^\w"\r\n])\1[\r\n]*', re.IGNORECASE)  # a first line for Excel


@dataclass(frozen=True)
class FileFormat:
    """How a file is written.

    Attributes:
        kind: csv, tsv, jsonl, json (a list of objects), conll (a token and its tag a line) or parquet.
        delimiter: between the fields of CSV and TSV; empty for the others.
        encoding: Python's name; empty for parquet.
        is_quoted: a field may stand in quotation marks, with line ends and the delimiter in it; else a ``"`` is a
            character.
        notes: what a reader of the results should know of the choice.
    """

    kind: str
    delimiter: str = ""
    encoding: str = ""
    is_quoted: bool = False
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What is worth showing, in words."""
        shown = {
            "format": _NAMES.get(self.kind, self.kind.upper()),
            "delimiter": DELIMITERS.get(self.delimiter, self.delimiter),
            "encoding": "UTF-8" if self.encoding == UTF8 else self.encoding,
        }
        return {key: value for key, value in shown.items() if value}


RAW_TSV: Final = FileFormat("tsv", "\t", UTF8)


def find_format(
    path: Path, delimiter: str | None = None, encoding: str | None = None, *, may_guess: bool = True
) -> FileFormat:
    """Tell how a file is written.

    The delimiter of CSV and TSV is the comma, semicolon, tab or pipe that gives all of the first rows as many fields as
    the header, or the one that a first line for Excel says, ``sep=;``. A TSV file is read with quotes where its header
    has them, where a field has doubled ones inside, or where only that gives every row its fields; else a ``"`` in it
    is a character, as in GLUE's files.

    Args:
        path: the file; its name's ending, less ``.gz``, says the kind.
        delimiter: one character, or its name; None looks for it.
        encoding: a name that Python knows; None looks for it.
        may_guess: a file that is not UTF-8 may be taken for cp1252, with a note.

    Raises:
        TaskError: no such file, an unknown kind, not text, or more than one delimiter is possible.
    """
    kind = _kind(path)
    if kind == "parquet":
        return FileFormat(kind)
    known, notes = encoding_of(path, encoding)
    if notes and not may_guess:
        raise TaskError(f"{path} is not in UTF-8; save it as UTF-8")
    if kind == "json":
        first = next((line.lstrip() for _, line in lines(path, known) if line.strip()), "")
        kind = "json" if first.startswith("[") else "jsonl"  # as `datasets` writes it: one object per line
    if kind in ("json", "jsonl", "conll"):
        return FileFormat(kind, encoding=known, notes=tuple(notes))
    chosen = _delimiter(path, kind, known, None if delimiter is None else read_delimiter(delimiter))
    is_quoted = True
    if kind == "tsv" and chosen == "\t":
        is_quoted, note = _has_quoting(path, known)
        notes += [note] if note else []
    return FileFormat(kind, chosen, known, is_quoted, tuple(notes))


def encoding_of(path: Path, encoding: str | None = None) -> tuple[str, list[str]]:
    """A text file's encoding, and what to say of one that was guessed.

    Args:
        encoding: given by the caller; None looks for it.

    Raises:
        TaskError: there is no such encoding, or the file is not text, see :func:`find_encoding`.
    """
    if encoding is not None:
        return known_encoding(encoding), []
    known = find_encoding(path)
    note = f"{path.name} is not UTF-8 and was read as {GUESS}; pass `encoding` if that is wrong"
    return known, [note] if known == GUESS else []


def check_used(formats: Mapping[Path, FileFormat], delimiter: str | None, encoding: str | None) -> None:
    """See that what the caller says of files is used for one of them.

    Raises:
        TaskError: a delimiter or an encoding was given, and none of the files has one.
    """
    for name, value in (("delimiter", delimiter), ("encoding", encoding)):
        if value is not None and formats and not any(getattr(one, name) for one in formats.values()):
            raise TaskError(f"`{name}={value}` was given, but {next(iter(formats))} has none; leave it out")


def read_delimiter(value: str) -> str:
    r"""The character that ``"tab"``, ``"\\t"``, ``";"`` or any other single character stands for.

    Raises:
        TaskError: it is something else.
    """
    names = {name: char for char, name in DELIMITERS.items()} | {"\\t": "\t"}
    char = names.get(value.lower(), value)
    if len(char) != 1 or char in '\r\n"':
        raise TaskError(
            f"`delimiter={value}` was given; expected one character, or its name: {', '.join(DELIMITERS.values())}"
        )
    return char


def records(rows: Iterable[str], delimiter: str) -> Any:
    """A ``csv.reader`` that refuses what is malformed, for fields of any length."""
    csv.field_size_limit(_LONGEST_FIELD)  # of the process, as csv has no other; its default is 128 KiB, a long document
    return csv.reader(rows, delimiter=delimiter, strict=True)


def table_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a CSV or TSV file, with their numbers; a first one that says the delimiter, ``sep=;``, is empty.

    Raises:
        TaskError: see :func:`sparsepeft.rows.decoding.lines`.
    """
    numbered = lines(path, encoding)
    for number, line in numbered:
        yield number, "\n" if _SAID.fullmatch(line) else line
        break
    yield from numbered


def split_raw(line: str, delimiter: str) -> list[str]:
    """The fields of a line in which a ``"`` is a character; none for an empty line."""
    line = line.rstrip("\r\n")
    return line.split(delimiter) if line else []


def _kind(path: Path) -> str:
    name = unpacked_name(path)
    ending = Path(name).suffix
    if ending in _SPREADSHEETS:
        raise TaskError(
            f"{path} is a spreadsheet or markup, not a table of text; save it as CSV (in Excel: Save As, CSV UTF-8) "
            "and pass that file"
        )
    if ending not in _KINDS or (ending == ".parquet" and name != path.name.lower()):
        raise TaskError(
            f"{path}: the ending says no known format; expected {', '.join(FORMATS)}, also with .gz (but for parquet); "
            "rename or convert the file"
        )
    return _KINDS[ending]


def _delimiter(path: Path, kind: str, encoding: str, chosen: str | None) -> str:
    if chosen is None and (said := next((_SAID.fullmatch(line) for _, line in lines(path, encoding)), None)):
        return said[2]
    sample = [line for _, line in islice(table_lines(path, encoding), _SAMPLE)]
    widths = {char: _widths(sample, char, kind) for char in DELIMITERS}
    splits = [char for char, found in widths.items() if found and found[0] > 1]
    fits = [char for char in splits if len(set(widths[char])) == 1]
    if chosen is not None:
        header = next((line.rstrip("\r\n") for line in sample if line.strip()), "")
        if chosen not in header and splits:
            others = " or ".join(f"`delimiter={DELIMITERS[char]}`" for char in fits or splits)
            raise TaskError(
                f"{path}: `delimiter={DELIMITERS.get(chosen, chosen)}` was given, but the header {header[:60]!r} has "
                f"none; pass {others}"
            )
        return chosen
    usual = "\t" if kind == "tsv" else ","
    if len(fits) == 1 or (len(splits) == 1 and not fits):
        return (fits or splits)[0]
    if not splits or (usual in splits and not fits):
        return usual  # one column; or reading it says which row is wrong
    names = ", ".join(DELIMITERS[char] for char in fits or splits)
    raise TaskError(f"{path}: the fields could be separated by more than one of {names}; pass `delimiter`")


def _widths(sample: list[str], delimiter: str, kind: str) -> list[int]:
    """How many fields each record has; empty where not even the header can be read."""
    if delimiter == "\t" and kind == "tsv":
        raw = [len(fields) for line in sample if (fields := split_raw(line, delimiter))]
        if len(set(raw)) == 1:
            return raw
        return _quoted_widths(sample, delimiter) or raw
    return _quoted_widths(sample, delimiter)


def _quoted_widths(sample: list[str], delimiter: str) -> list[int]:
    reader, widths = records(sample, delimiter), []
    try:
        for record in reader:
            if record:
                widths.append(len(record))
    except csv.Error:
        if len(sample) < _SAMPLE or reader.line_num < _SAMPLE:  # else the sample ends within a record
            return [*widths, 0] if widths else []  # no row has 0 fields, so this never fits
    return widths


def _has_quoting(path: Path, encoding: str) -> tuple[bool, str | None]:
    """Whether a TSV file has quoted fields, and what to say of a choice that could have been the other."""
    width, is_raw, header_quoted, num_quoted, doubled = 0, True, False, 0, False
    for _, line in table_lines(path, encoding):
        fields = split_raw(line, "\t")
        if not width:
            width, header_quoted = len(fields), any(name.startswith('"') for name in fields)
        is_raw = is_raw and len(fields) in (0, width)
        quoted = [field for field in fields if field.startswith('"')]
        num_quoted += len(quoted)
        doubled = doubled or any('""' in field[1:-1] for field in quoted)
    if not num_quoted or not _is_csv(table_lines(path, encoding)):
        return False, None
    if not is_raw or header_quoted:
        return True, None
    if doubled:
        return True, f'{path.name} was read as TSV with quoted fields, since it has doubled ""'
    return False, (
        f"the quotation marks around {num_quoted:,} fields of {path.name} were taken for part of the text; if they are "
        "not, rename it to .csv"
    )


def _is_csv(numbered: Iterator[tuple[int, str]]) -> bool:
    """Whether strict reading with quotes gives every record as many fields."""
    widths: set[int] = set()
    try:
        for record in records((line for _, line in numbered), "\t"):
            if record:
                widths.add(len(record))
            if len(widths) > 1:
                return False
    except csv.Error:
        return False
    return True
