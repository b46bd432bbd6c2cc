"""Parquet files, read a part at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sparsepeft.errors import TaskError
from sparsepeft.extras import require

_BUFFER: Final = 1 << 20  # bytes of a column that are read at a time


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile`` that need not be held in memory, however large its row groups are.

    Raises:
        TaskError: no such file, or none of that format; also where that is found within the context.
    """
    pa = require("pyarrow", "train", "A Parquet file")
    pq = require("pyarrow.parquet", "train", "A Parquet file")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise TaskError(f"{path} {what}; expected a file with examples, check the path")
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as parquet ({error}); write it again") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a class of `datasets` (``ClassLabel``) is its name rather than its number.

    Where there is none, `datasets` has -1, which is None here.

    Raises:
        TaskError: as for :func:`parquet_file`, or a class has no name.
    """
    with parquet_file(path) as file:
        names = _class_names(file.schema_arrow.metadata or {})
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield {key: _named(f"{path}: {key}", value, names.get(key)) for key, value in row.items()}


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes by column, from what `datasets` says of its features."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    names = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature  # a list of classes
        if isinstance(inner, list) and len(inner) == 1:  # as it is written before version 4
            (inner,) = inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            names[column] = inner["names"]
    return names


def _named(where: str, value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(where, each, names) for each in value]
    if not isinstance(value, int):
        return value
    if not -1 <= value < len(names):
        raise TaskError(f"{where} has class {value} of {len(names)}; expected 0 to {len(names) - 1}, correct the file")
    return None if value == -1 else names[value]
