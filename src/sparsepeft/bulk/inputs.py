"""The files to answer, read in chunks of rows."""

from __future__ import annotations

import glob
import itertools
import logging
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsepeft.bulk.plan import Plan
from sparsepeft.errors import UserError
from sparsepeft.inference.answering import WINDOW
from sparsepeft.rows.decoding import is_gzipped, unpacked_name
from sparsepeft.rows.formats import FileFormat, find_format
from sparsepeft.rows.parquet import parquet_file
from sparsepeft.rows.reading import check_columns, read_header, read_rows
from sparsepeft.scoring.questions import Question, as_question, beside, encoding_of_lines, read_questions, text_columns

logger = logging.getLogger(__name__)

_PARQUET, _LINES, _TABLES = ".parquet", ".jsonl", (".csv", ".tsv")
_MOST_BYTES = 16 << 20  # of a chunk, about: fewer rows where they are long


@dataclass(frozen=True)
class Source:
    """A file to answer.

    Attributes:
        path: where it is.
        form: how it is written.
        columns: what it has; empty for lines of JSON, each of which has its own, and for an empty file.
    """

    path: Path
    form: FileFormat
    columns: tuple[str, ...] = ()

    @property
    def is_gzipped(self) -> bool:
        """Whether it is packed, as its answers then are, too."""
        return is_gzipped(self.path)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        file: its number.
        questions: one for each row.
        batch: for parquet, the rows' columns; else the questions have them.
        columns: for lines of JSON, those that any row of the file has, so that a name means the same in all of them.
        place: among the file's chunks, from 0.
        is_last: of these.
        share: of the file's rows, up to the end of these.
        failure: why the rest of the file cannot be read; None where it can.
    """

    file: int
    questions: list[Question] = field(default_factory=list)
    batch: Any = None
    columns: Collection[str] = ()
    place: int = 0
    is_last: bool = False
    share: float = 1.0
    failure: str | None = None


def find_files(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that paths and patterns name, each once.

    Raises:
        UserError: there is none for one of them, one has another ending, or two have the same name, as their answers
            would.
    """
    found: dict[Path, None] = {}
    for one in [inputs] if isinstance(inputs, str | Path) else inputs:
        if Path(one).is_dir():
            raise UserError(f"{one} is a folder; pass a pattern for the files in it, such as '{one}/*.parquet'.")
        paths = (
            [Path(one)] if Path(one).is_file() else [Path(path) for path in sorted(glob.glob(str(one), recursive=True))]
        )
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f"There is no file {one}; pass files, or a pattern such as 'texts/*.parquet' in quotes.")
        found |= dict.fromkeys(path.absolute() for path in paths)
    names: dict[str, Path] = {}
    for path in found:
        if _ending(path) not in (_PARQUET, _LINES, *_TABLES):
            raise UserError(
                f"{path} was given; expected names that end in {', '.join((_PARQUET, _LINES, *_TABLES))}, all but the "
                "first also with .gz: rename or convert the file."
            )
        if path.name in names:
            raise UserError(
                f"{names[path.name]} and {path} have the same name, as their answers would; rename one, or answer them "
                "into two folders."
            )
        names[path.name] = path
    if not names:
        raise UserError("No file was given; pass at least one.")
    return list(found)


def look_at(path: Path, plan: Plan) -> Source:
    """See how a file is written, and that it has the columns of the texts.

    Raises:
        UserError: it cannot be read, or it cannot be told which columns are the texts.
    """
    if _ending(path) == _LINES:
        return Source(path, FileFormat("jsonl", encoding=encoding_of_lines(path, plan.table)))
    form = find_format(path, plan.table.delimiter, plan.table.encoding)
    for note in form.notes:
        logger.warning("%s", note)
    if form.kind == "parquet":
        with parquet_file(path) as file:
            columns = file.schema_arrow.names
            check_columns(path, columns)
    else:
        columns = read_header(path, form)
    if columns:
        text_columns(path, columns, plan, plan.table)
    return Source(path, form, tuple(columns))


def read_chunks(number: int, source: Source, plan: Plan) -> Iterator[Chunk]:
    """The rows of a file, in order; at least one chunk, the last of which says so.

    A table that is malformed anywhere is refused before the first row is asked.
    """
    read = {"parquet": _parquet_chunks, "jsonl": _line_chunks}.get(source.form.kind, _table_chunks)
    place = 0
    try:
        chunks = read(source, plan)
        chunk = next(chunks)
        for following in itertools.chain(chunks, [None]):
            yield replace(chunk, file=number, place=place, is_last=following is None)
            if following is not None:
                chunk, place = following, place + 1
    except (UserError, OSError, EOFError, zlib.error) as error:
        yield Chunk(number, place=place, is_last=True, failure=str(error))


def _parquet_chunks(source: Source, plan: Plan) -> Iterator[Chunk]:
    import pyarrow as pa

    names = text_columns(source.path, list(source.columns), plan, plan.table)
    with parquet_file(source.path) as file:
        done, total, schema = 0, file.metadata.num_rows, file.schema_arrow
        size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups))
        rows = min(WINDOW, max(1, _MOST_BYTES * total // max(size, 1)))
        empty = pa.RecordBatch.from_pylist([], schema)
        for batch in file.iter_batches(batch_size=rows) if total else [empty]:
            columns = (batch.column(name).to_pylist() for name in names)
            questions = [as_question(list(texts), {}, plan) for texts in zip(*columns, strict=True)]
            done += len(questions)
            yield Chunk(0, questions, _with_text(batch, questions, names, plan), share=done / max(total, 1))


def _table_chunks(source: Source, plan: Plan) -> Iterator[Chunk]:
    if not source.columns:
        yield Chunk(0)
        return
    names = text_columns(source.path, list(source.columns), plan, plan.table)

    def rows() -> Iterator[dict[str, Any]]:
        return (row.values for row in read_rows(source.path, source.form, required=names, streamed=True))

    total = sum(1 for _ in rows())
    yield from _in_chunks((as_question([row[name] for name in names], row, plan) for row in rows()), total)


def _line_chunks(source: Source, plan: Plan) -> Iterator[Chunk]:
    table = replace(plan.table, delimiter=None, encoding=source.form.encoding)
    total, columns = 0, set[str]()
    for question in read_questions(source.path, plan, table):
        total += 1
        columns.update(question.columns)
    for chunk in _in_chunks(read_questions(source.path, plan, table), total):
        yield replace(chunk, columns=columns)


def _in_chunks(questions: Iterator[Question], total: int) -> Iterator[Chunk]:
    """Questions by so many; one empty chunk where there is none."""
    waiting: list[Question] = []
    size = done = 0
    for question in questions:
        waiting.append(question)
        values = (*question.columns.values(), *question.added.values())
        size += sum(len(value) for value in values if isinstance(value, str))
        if len(waiting) == WINDOW or size > _MOST_BYTES:
            done += len(waiting)
            yield Chunk(0, waiting, share=done / total)
            waiting, size = [], 0
    if waiting or not done:
        yield Chunk(0, waiting)


def _with_text(batch: Any, questions: Sequence[Question], names: tuple[str, ...], plan: Plan) -> Any:
    """The batch; where its texts are lists of tokens, with the text that answers say places of."""
    import pyarrow as pa

    kind = batch.schema.field(names[0]).type
    if not plan.spec.labels_tokens or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return batch
    texts = pa.array([question.added.get("text") for question in questions], pa.string())
    *_, name = beside(dict.fromkeys(batch.schema.names), {"text": texts})
    return batch.append_column(name, texts)


def _ending(path: Path) -> str:
    """The ending of a name, less .gz, which parquet never has."""
    name = unpacked_name(path)
    return path.name.lower() if is_gzipped(path) and name.endswith(_PARQUET) else Path(name).suffix
