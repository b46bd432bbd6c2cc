"""Text files: their encoding and their lines, with one clear error for a file that is not text."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

from sparsepeft.errors import TaskError

UTF8: Final = "utf-8-sig"  # with a byte order mark or without
GUESS: Final = "cp1252"  # what Western European and American Windows programs write when it is not UTF-8
MAX_BYTES: Final = 4 << 30
_MARKS: Final = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHUNK: Final = 1 << 20
_UNDEFINED: Final = bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D])  # in cp1252
_ASCII: Final = bytes(range(128))
_NO_LETTERS: Final = bytes(set(range(256)) - {*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"})
_MOST_ACCENTS: Final = 0.25  # of the letters; a text in another script has more
_ASK: Final = "pass `encoding`, such as latin-1, cp1251 or shift_jis, or save the file as UTF-8"


def known_encoding(name: str) -> str:
    """Python's name of an encoding; UTF-8 becomes the variant that accepts a byte order mark.

    Raises:
        TaskError: it does not.
    """
    try:
        codec = codecs.lookup(name)
        "".encode(codec.name)  # "rot13" and "base64" are codecs too, but not of texts
    except (LookupError, ValueError) as error:
        raise TaskError(
            f"`encoding={name}` was given; expected the name of a text encoding, such as utf-8, cp1252 or latin-1"
        ) from error
    return UTF8 if codec.name == "utf-8" else codec.name


def find_encoding(path: Path) -> str:
    """Tell a file's encoding by its byte order mark; without one it is UTF-8, or else taken for cp1252.

    Raises:
        TaskError: the file is no text, in neither encoding, or cannot be read; a line or two are no UTF-8.
    """
    marked = marked_encoding(path)
    if marked != UTF8:
        return marked
    with _opened(path) as stream:
        chunk = stream.read(_CHUNK)
        if chunk.startswith(b"\x1f\x8b"):
            raise TaskError(f"{path} is gzipped, but its name does not say so; add .gz to the name")
        if b"\0" in chunk:
            raise TaskError(
                f"{path} is not a text file, as it has NUL bytes; save a spreadsheet as CSV (UTF-8), and for UTF-16 "
                "without a byte order mark pass `encoding=utf-16`"
            )
        decoder = codecs.getincrementaldecoder("utf-8")()
        num_lines, is_ascii = 0, True
        try:
            while chunk:
                is_ascii = decoder.decode(chunk).isascii() and is_ascii
                num_lines += chunk.count(b"\n")
                chunk = stream.read(_CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            if is_ascii and before.isascii():
                return _guess(path)
            line = num_lines + before.count(b"\n") + 1
            raise TaskError(
                f"{path}:{line}: the byte 0x{error.object[error.start]:02x} is no UTF-8, although the text before it "
                f"is; correct that line, or {_ASK}"
            ) from error
    return UTF8


def marked_encoding(path: Path) -> str:
    """The encoding that a file's byte order mark says; UTF-8 where it has none.

    Raises:
        TaskError: the file cannot be read.
    """
    with _opened(path) as stream:
        start = stream.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), UTF8)


def is_gzipped(path: Path) -> bool:
    """Whether a file's name ends in ``.gz``, in any case."""
    return path.suffix.lower() == ".gz"


def unpacked_name(path: Path) -> str:
    """A file's name in lower case, without ``.gz``; its ending says how the file is written."""
    return path.name.lower().removesuffix(".gz")


def lines(path: Path, encoding: str = UTF8) -> Iterator[tuple[int, str]]:
    r"""The lines of a file, with their numbers from 1.

    Only ``\n`` ends a line; a ``\r`` or U+2028 inside a sentence does not, unless the file has no ``\n`` at all.

    Raises:
        TaskError: the file is missing, damaged, or in another encoding.
    """
    number = 0
    end = line_end(path, encoding)
    with _opened(path) as stream, io.TextIOWrapper(stream, encoding, newline=end) as text:
        try:
            for number, line in enumerate(text, 1):
                yield number, line
        except UnicodeError as error:
            name = "UTF-8" if encoding == UTF8 else encoding
            reason = error.reason if isinstance(error, UnicodeDecodeError) else error
            raise TaskError(
                f"{path}: not {name} text after line {number} ({reason}); convert the file to UTF-8, or pass its "
                "`encoding`"
            ) from error


def check_size(path: Path) -> None:
    """Refuse a file whose rows are many to be held in memory.

    Raises:
        TaskError: it is one.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise TaskError(
            f"{path} has {path.stat().st_size / 1e9:.1f} GB, but the rows of a file are held in memory, and at most "
            f"{MAX_BYTES / 1e9:.1f} GB are read; pass a part of it"
        )


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise TaskError(f"{path} {what}; expected a file with examples, check the path")
    try:
        with path.open("rb") as plain:
            if not is_gzipped(path):
                yield plain
                return
            with gzip.open(plain) as unpacked:
                yield cast(io.BufferedReader, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: damaged gzip file ({error}); expected a whole .gz file, fetch it again") from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}") from error


def line_end(path: Path, encoding: str) -> str:
    r"""What ends a file's lines: ``\r`` where its start has that and no ``\n``, else ``\n``.

    Raises:
        TaskError: the file cannot be read.
    """
    with _opened(path) as stream, io.TextIOWrapper(stream, encoding, errors="replace", newline="") as text:
        start = text.read(1 << 16)
    return "\r" if "\r" in start and "\n" not in start else "\n"  # "\r": old programs on the Macintosh


def _guess(path: Path) -> str:
    """cp1252, where that is plausible: every byte is a character, and the text is in Latin letters."""
    num_letters = num_others = 0
    with _opened(path) as stream:
        while chunk := stream.read(_CHUNK):
            others = chunk.translate(None, _ASCII)
            num_others += len(others)
            num_letters += len(chunk.translate(None, _NO_LETTERS))
            if others.translate(None, _UNDEFINED) != others:
                raise TaskError(f"{path} is neither in UTF-8 nor in cp1252; {_ASK}")
    if num_others > _MOST_ACCENTS * (num_letters + num_others):
        raise TaskError(f"{path} is not in UTF-8 and hardly in Latin letters; {_ASK}")
    return GUESS
