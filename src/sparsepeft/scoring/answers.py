"""What a run answers: a row for each question, as soon as it can be given, for JSON lines or CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sparsepeft.errors import UserError
from sparsepeft.inference.portable import Prediction
from sparsepeft.inference.predictor import Predictor
from sparsepeft.scoring.questions import Question, beside
from sparsepeft.tasks import TaskSpec

FORMATS = ("jsonl", "csv")
_BATCHES = 8  # that are sorted by length together
Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """A question's columns, the prediction for it, and what is added to the row besides."""

    columns: dict[str, Any]
    prediction: Prediction
    added: dict[str, Any] = field(default_factory=dict)


class Labels(Protocol):
    """What flat answers depend on: a ``TaskSpec``, or a ``TaskInfo``."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """By class index; None for regression."""

    @property
    def multi_label(self) -> bool:
        """Whether several may hold at once."""

    @property
    def labels_tokens(self) -> bool:
        """Whether they are of tokens."""


def cells(prediction: Prediction) -> dict[str, Any]:
    """What a prediction adds to a row: ``label``, ``score`` and ``scores``; or ``labels``, ``entities``, ``error``.

    An input that was longer than the task takes has ``truncated``. Scores are rounded to four digits, predicted values
    to six.
    """
    cut = {"truncated": True} if prediction.truncated else {}
    if prediction.error is not None:
        return {"error": prediction.error}
    if prediction.entities is not None:
        rounded = ({**asdict(each), "score": float(f"{each.score:.4g}")} for each in prediction.entities)
        return {"entities": list(rounded), **cut}
    if prediction.label is None:
        return {"score": float(f"{prediction.score:.6g}"), **cut}
    scores = {name: float(f"{score:.4g}") for name, score in prediction.scores.items()}
    if prediction.labels is not None:
        return {"labels": list(prediction.labels), "scores": scores, **cut}
    return {"label": prediction.label, "score": scores[prediction.label], "scores": scores, **cut}


def flat_cells(prediction: Prediction, task: Labels) -> dict[str, Any]:
    """Like :func:`cells`, the same in all rows: a column for each label's score, and ``error``.

    Several labels are one text, with ``|`` between them; they stay a list where a label of the task has one in it.
    """
    found = cells(prediction)
    error, scores = found.pop("error", None), found.pop("scores", {})
    found.pop("truncated", None)
    flat: dict[str, Any]
    if task.labels_tokens:
        flat = {"entities": None}
    elif task.label_names is None:
        flat = {"score": None}
    else:
        first: dict[str, Any] = {"labels": None} if task.multi_label else {"label": None, "score": None}
        flat = first | {f"score_{name}": scores.get(name) for name in task.label_names}
    flat |= found | {"error": error}
    if flat.get("labels") is not None and not any("|" in name for name in task.label_names or ()):
        flat["labels"] = "|".join(flat["labels"])
    return flat


def answer(predictor: Predictor, questions: Iterable[Question]) -> Iterator[list[Answer]]:
    """Answer questions in order, those together that have come while others were answered.

    Args:
        predictor: of the run that is asked.
        questions: any number; they are read in a thread of their own.

    Yields:
        Answers to at most eight batches of questions.
    """
    size = _BATCHES * predictor.batch_size if predictor.batch_size > 1 else 1
    for batch in arriving(questions, size):
        readable = [question.texts for question in batch if question.error is None]
        predictions = iter(predictor.predict(readable, on_error="return"))
        yield [
            Answer(
                question.columns,
                next(predictions) if question.error is None else Prediction.failed(question.error),
                question.added,
            )
            for question in batch
        ]


def arriving(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Lists of up to ``most`` items: what has come so far, as soon as there is one. A thread reads on meanwhile."""
    waiting: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(2 * most)
    abandoned = threading.Event()

    def put(item: tuple[Item] | BaseException | None) -> None:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0.1)

    def read() -> None:
        end = None
        try:
            for item in items:
                if abandoned.is_set():
                    return
                put((item,))
        except BaseException as error:  # is raised where the items are wanted
            end = error
        put(end)

    threading.Thread(target=read, daemon=True).start()
    end: BaseException | bool = False
    try:
        while end is False:
            batch: list[Item] = []
            while len(batch) < most and end is False:
                try:
                    received = waiting.get(block=not batch)
                except queue.Empty:
                    break
                if isinstance(received, tuple):
                    batch.append(received[0])
                else:
                    end = received or True
            if batch:
                yield batch
        if isinstance(end, BaseException):
            raise end
    finally:
        abandoned.set()


def format_of(format: str | None, output: Path | None) -> str:
    """The format to write: the one that was asked for, else the one that the file's ending says, else JSON lines.

    Raises:
        UserError: it is none of :data:`FORMATS`.
    """
    chosen = format or (output.suffix.lstrip(".") if output is not None and output.suffix else FORMATS[0])
    chosen = "jsonl" if chosen == "json" else chosen
    if chosen not in FORMATS:
        option = f"`output_format={format}`" if format is not None else f"`output={output}`"
        raise UserError(f"{option} was given, but answers are written as {' or '.join(FORMATS)}; pass one of these.")
    return chosen


class AnswerLines:
    """Turns answers into the lines of their rows: the columns as they came, then those of :func:`cells`.

    A name that was a row's column is ours in no later one, see :func:`beside`: where some rows have their true label,
    no prediction stands among them.

    For CSV the cells are those of :func:`flat_cells`, and the first line is a header, with the columns of the first
    input that could be read: those before it, which have none, are held back until then.

    Args:
        format: one of :data:`FORMATS`.
        spec: of the task.
    """

    def __init__(self, format: str, spec: TaskSpec) -> None:
        self._spec = spec
        self._rows = CsvRows() if format == "csv" else None
        self._held: list[Answer] = []
        self._taken: set[str] = set()

    def __call__(self, answer: Answer) -> str:
        """The line, or lines, of an answer and of those that were held back."""
        if self._rows is None:
            return json_line(self._row(answer, cells(answer.prediction)))
        row = self._flat_row(answer)
        if self._rows.has_header:
            return self._rows(row, must_fit=bool(answer.columns))
        if answer.prediction.error is not None and not answer.columns:
            self._held.append(answer)
            return ""
        return self._rows.begin(row) + self.end() + self._rows(row)

    def end(self) -> str:
        """The lines of answers that are still held back."""
        held, self._held = self._held, []
        if self._rows is None:
            return ""
        return "".join(self._rows(self._flat_row(each), must_fit=False) for each in held)

    def _flat_row(self, answer: Answer) -> dict[str, Any]:
        return self._row(answer, flat_cells(answer.prediction, self._spec))

    def _row(self, answer: Answer, added: dict[str, Any]) -> dict[str, Any]:
        self._taken.update(answer.columns)
        return beside(answer.columns, answer.added | added, self._taken)


def json_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON."""
    row = _finite(row)
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which an escape can write
        line = json.dumps(row, allow_nan=False, default=str)
    return line + "\n"


class CsvRows:
    """Rows of CSV.

    Args:
        header: the columns, if a header is not to be written; else the first row's are, above it.
        delimiter: between fields.
        is_quoted: a field may stand in quotation marks; else one of them is a character.
    """

    def __init__(self, header: Sequence[str] = (), delimiter: str = ",", is_quoted: bool = True) -> None:
        self._header: dict[str, None] = dict.fromkeys(header)
        self._delimiter, self._is_quoted = delimiter, is_quoted

    @property
    def has_header(self) -> bool:
        """Whether the columns are known."""
        return bool(self._header)

    def begin(self, columns: Iterable[str]) -> str:
        """The line of a header, which all rows have from now on."""
        self._header = dict.fromkeys(columns)
        return self._line(self._header)

    def __call__(self, row: dict[str, Any], *, must_fit: bool = True) -> str:
        """The line of a row, or lines.

        Args:
            row: by column; what it lacks is empty.
            must_fit: refuse columns that the header lacks; else they are left out.

        Raises:
            UserError: there are some.
        """
        header = "" if self._header else self.begin(row)
        if must_fit and (further := row.keys() - self._header.keys()):
            raise UserError(
                f"A row has the column {min(further)!r}, which the first one lacks, so that they fit no CSV; pass "
                "`output_format=jsonl`."
            )
        return header + self._line(_cell(row.get(name)) for name in self._header)

    def _line(self, cells: Iterable[Any]) -> str:
        if self._is_quoted:
            text = io.StringIO()
            # Python 3.11 quotes a field only for what is also in the end of the writer's own lines.
            csv.writer(text, delimiter=self._delimiter, lineterminator="\r\n").writerow(cells)
            written = text.getvalue().removesuffix("\r\n") + "\n"
        else:  # the csv module would refuse some characters that such a field may have
            written = self._delimiter.join(map(_raw, cells)) + "\n"
        return written.encode("utf-8", "replace").decode()


def _raw(cell: Any) -> str:
    """A field between tabs, in which there can be no tab and no end of a line."""
    return "" if cell is None else str(cell).replace("\t", " ").replace("\n", " ")


def _cell(value: Any) -> Any:
    value = _finite(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else value


def _finite(value: Any) -> Any:
    """A value for JSON, which has no numbers that are not finite: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
