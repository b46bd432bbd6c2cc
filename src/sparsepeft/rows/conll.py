"""Files with a token and its tag a line: CoNLL's, and those that are called .bio, .iob or .iob2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.decoding import lines

_TOKENS: Final = "tokens"
_TAGS: Final = "tags"
_DOCUMENT: Final = "-DOCSTART-"  # CoNLL-2003's line between documents
_SETTING: Final = re.compile(r"#\s*\S+\s+=\s")  # CoNLL-U's comments


def read_sentences(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """The sentences of a file: the line on which each begins, its ``tokens`` and, where there are some, its ``tags``.

    A line has columns with a tab between them, or else spaces: first the token, last its tag, and what stands between
    these is not read. A line with one column is a token without a tag. An empty line ends a sentence, and so does
    CoNLL-2003's ``-DOCSTART-``. A line that begins with ``#`` is a comment, unless it has as many columns as the
    others, with what they have between them: then it is a token, such as a hashtag. ``# name = value`` is always one.

    Raises:
        TaskError: the file cannot be read, or a line lacks a column, a token or a tag.
    """
    width, has_tabs = _width(path, encoding)
    start, rows = 0, list[list[str]]()
    for number, line in lines(path, encoding):
        fields = _fields(line)
        if not fields or fields[0] == _DOCUMENT:
            if rows:
                yield start, _values(rows)
            rows = []
            continue
        is_alike = len(fields) == width and ("\t" in line) == has_tabs
        if fields[0].startswith("#") and (not is_alike or _SETTING.match(line)):
            continue
        if len(fields) != width:
            raise TaskError(
                f"{path}:{number}: found {len(fields)} column(s); expected {width} as in the file's first line (the "
                "token first and its tag last, with tabs or else spaces between), correct the line"
            )
        if not all((fields[0], fields[-1])):
            raise TaskError(f"{path}:{number}: the {'tag' if fields[0] else 'token'} is empty; fill it in")
        start = start if rows else number
        rows.append(fields)
    if rows:
        yield start, _values(rows)


def _width(path: Path, encoding: str) -> tuple[int, bool]:
    """Columns of the first line that is certainly a token's, and whether it has tabs between them.

    Of the first comment where all lines could be some.
    """
    widths = [(0, False)]
    for _, line in lines(path, encoding):
        fields = _fields(line)
        if fields and fields[0] != _DOCUMENT:
            widths.append((len(fields), "\t" in line))
            if not fields[0].startswith("#"):
                return widths[-1]
    return widths[:2][-1]


def _fields(line: str) -> list[str]:
    """The columns of a line; none where it is empty."""
    if not line.strip():
        return []
    if "\t" in line:
        return [field.strip(" ") for field in line.rstrip("\r\n").split("\t")]
    return [field for field in line.strip(" \r\n").split(" ") if field]


def _values(rows: list[list[str]]) -> dict[str, list[str]]:
    tokens = [fields[0] for fields in rows]
    return {_TOKENS: tokens} if len(rows[0]) == 1 else {_TOKENS: tokens, _TAGS: [fields[-1] for fields in rows]}
