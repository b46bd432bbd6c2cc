"""Answers beside the columns of their rows, in the format of the file that asked."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsepeft.bulk.inputs import Chunk, Source
from sparsepeft.bulk.plan import flat_names, joined
from sparsepeft.folders import writing
from sparsepeft.inference.portable import Prediction
from sparsepeft.inference.tasks import TaskInfo
from sparsepeft.scoring.answers import CsvRows, cells, flat_cells, json_line
from sparsepeft.scoring.questions import beside

_GROUP_ROWS, _GROUP_BYTES = 1 << 16, 64 << 20  # of a parquet file's row groups, at most

Answers = Sequence[Mapping[str, Prediction]]  # for each row the prediction of each task


def encode(chunk: Chunk, source: Source, tasks: Mapping[str, TaskInfo], answers: Answers) -> Any:
    """What is written for a chunk: bytes, or a ``pyarrow.RecordBatch`` for parquet."""
    if source.form.kind == "parquet":
        return _with_columns(chunk.batch, tasks, answers)
    if source.form.kind == "jsonl":
        rows = (joined({name: cells(one) for name, one in row.items()}) for row in answers)
        text = "".join(
            json_line(beside(question.columns, question.added | row, chunk.columns))
            for question, row in zip(chunk.questions, rows, strict=True)
        )
    else:
        text = _table(chunk, source, tasks, answers)
    content = text.encode()
    # Packed streams may follow one another in a file; without a time, the same rows give the same bytes.
    return gzip.compress(content, mtime=0) if source.is_gzipped else content


def _table(chunk: Chunk, source: Source, tasks: Mapping[str, TaskInfo], answers: Answers) -> str:
    header = list(beside(dict.fromkeys(source.columns), dict.fromkeys(flat_names(tasks))))
    write = CsvRows(header, source.form.delimiter, source.form.is_quoted)
    lines = [write.begin(header)] if chunk.place == 0 and source.columns else []
    for question, row in zip(chunk.questions, answers, strict=True):
        added = joined({name: flat_cells(one, tasks[name]) for name, one in row.items()})
        lines.append(write(beside(question.columns, added)))
    return "".join(lines)


def _with_columns(batch: Any, tasks: Mapping[str, TaskInfo], answers: Answers) -> Any:
    import pyarrow as pa

    types = joined({name: _types(info) for name, info in tasks.items()}) | {"error": pa.string()}
    rows = [joined({name: _typed_cells(one) for name, one in row.items()}) for row in answers]
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    named = beside(dict.fromkeys(batch.schema.names), columns)
    for name in list(named)[batch.num_columns :]:
        batch = batch.append_column(name, named[name])
    return batch


def _typed_cells(prediction: Prediction) -> dict[str, Any]:
    """What a prediction adds to a row where a column has a value in each that was answered."""
    return cells(prediction) if prediction.error is not None else {"truncated": False} | cells(prediction)


def _types(task: TaskInfo) -> dict[str, Any]:
    """The types of a task's columns, but for the error, see :func:`sparsepeft.scoring.answers.cells`."""
    import pyarrow as pa

    texts, numbers = pa.string(), pa.float64()
    columns: dict[str, Any]
    if task.labels_tokens:
        places = {"start": pa.int64(), "end": pa.int64()}
        entity = {"label": texts, "score": numbers, "word": texts, **places}
        columns = {"entities": pa.list_(pa.struct(list(entity.items())))}
    elif task.label_names is None:
        columns = {"score": numbers}
    else:
        scores = pa.struct([(name, numbers) for name in task.label_names])
        first = {"labels": pa.list_(texts)} if task.multi_label else {"label": texts, "score": numbers}
        columns = {**first, "scores": scores}
    return columns | {"truncated": pa.bool_()}


@contextmanager
def open_output(path: Path) -> Iterator[Callable[[Any], object]]:
    """What takes the contents of a file in order; it is there when all of them were taken, or not at all."""
    with writing(path) as stream:
        if path.suffix.lower() != ".parquet":
            yield stream.write
            return
        groups = _RowGroups(stream)
        try:
            yield groups.take
            groups.flush()
        finally:
            groups.close()


class _RowGroups:
    """A parquet file with row groups of a useful size."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._writer = stream, None
        self._waiting: list[Any] = []

    def take(self, batch: Any) -> None:
        """Write a batch, when there are enough rows."""
        import pyarrow.parquet as pq

        self._writer = self._writer or pq.ParquetWriter(self._stream, batch.schema)
        self._waiting.append(batch)
        rows, size = (sum(getattr(one, name) for one in self._waiting) for name in ("num_rows", "nbytes"))
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        import pyarrow as pa

        if self._writer is not None and any(len(batch) for batch in self._waiting):
            self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=_GROUP_ROWS)
        self._waiting = []

    def close(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()
