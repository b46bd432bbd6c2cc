"""From requests to predictions: encode, batch, route each row to its task's model, decode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sparsepeft.arguments import check_flag
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Encoded, batches_by_length, windows
from sparsepeft.inference.entities import EntityOptions, Strategy, entity_options, find_entities
from sparsepeft.inference.portable import (
    NAN,
    NO_TOKENS,
    NOT_FINITE,
    Input,
    InputError,
    OnError,
    Prediction,
    TruncationSide,
    as_list,
    check_on_error,
    check_truncation_side,
    find_task,
    prediction,
    texts_of,
)
from sparsepeft.inference.tasks import LoadedTask, TaskInfo, TaskRegistry

Request = tuple[str, Input]
Item = TypeVar("Item")

WINDOW = 4096  # inputs that are encoded and sorted by length at a time


class Cutting(NamedTuple):
    """What happens to an input that is too long: whether it may be cut, and where.

    With ``stride`` a text whose tokens are labelled is not cut, but read in parts that share so many tokens.
    """

    allowed: bool
    side: TruncationSide | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Row:
    """One input of one task, or a part of it: where its answer goes, and its tokens."""

    place: int
    task: LoadedTask
    encoded: Encoded
    part: int = 0
    num_parts: int = 1

    def __len__(self) -> int:
        return len(self.encoded)


class Answers:
    """Predictions by place, from the logits of rows that come in any order.

    Args:
        options: how tokens become entities.
    """

    def __init__(self, options: EntityOptions) -> None:
        self.predictions: dict[int, Prediction] = {}
        self._options = options
        self._parts: dict[int, list[tuple[Row, np.ndarray]]] = defaultdict(list)  # of inputs that lack some yet

    def put(self, row: Row, logits: np.ndarray) -> None:
        """Take in what :func:`batch_logits` gave for a row."""
        self._parts[row.place].append((row, logits))
        if len(self._parts[row.place]) == row.num_parts:
            parts = sorted(self._parts.pop(row.place), key=lambda one: one[0].part)
            self.predictions[row.place] = self._of_tokens(parts) if row.task.info.labels_tokens else _of_text(*parts[0])

    def _of_tokens(self, parts: list[tuple[Row, np.ndarray]]) -> Prediction:
        if not all(np.isfinite(logits).all() for _, logits in parts):
            return Prediction.failed(NOT_FINITE)
        task = parts[0][0].task
        encoded = [(row.encoded, logits) for row, logits in parts]
        names, by_word = task.info.label_names or (), task.info.is_by_word
        entities = find_entities(encoded, task.encoder.tokenizer, names, self._options, by_word=by_word)
        truncated, num_tokens = any(row.encoded.truncated for row, _ in parts), sum(len(row) for row, _ in parts)
        return Prediction(None, NAN, truncated=truncated, num_tokens=num_tokens, entities=entities)


def _of_text(row: Row, logits: np.ndarray) -> Prediction:
    info = row.task.info
    about: dict[str, Any] = {"truncated": row.encoded.truncated, "num_tokens": len(row)}
    return prediction(logits, info.label_names, multi_label=info.multi_label, thresholds=info.thresholds, **about)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an :class:`InputError`, which exported runners raise as well, into a ``UserError``."""
    try:
        yield
    except InputError as error:
        raise UserError(str(error)) from None


class Engine:
    """Answers requests with the tasks that are loaded.

    Args:
        token_budget: tokens of a batch, padding included; None for no limit.
        batch_size: rows of a batch; None for no limit.
    """

    def __init__(self, token_budget: int | None = None, batch_size: int | None = None) -> None:
        self._token_budget, self._batch_size = token_budget, batch_size
        self._tasks = TaskRegistry()

    def add_loaded(self, name: str, task: LoadedTask) -> None:
        """Take in a task whose model is in memory."""
        self._tasks.add(name, lambda: task)

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """The loaded tasks."""
        return {name: task.info for name, task in self._tasks.now().items()}

    @contextmanager
    def loaded(self, name: str) -> Iterator[LoadedTask]:
        """A task that stays in memory while the context lasts, even if it is replaced or removed meanwhile.

        Raises:
            UserError: there is none of this name.
        """
        with user_errors(), self._tasks.in_use() as tasks:
            yield find_task(name, tasks)

    @user_errors()
    def predict(
        self,
        requests: Iterable[Request],
        *,
        truncation: bool = True,
        truncation_side: TruncationSide | None = None,
        on_error: OnError = "return",
        aggregation_strategy: Strategy | None = None,
        ignore_labels: Iterable[str] = ("O",),
        stride: int | None = None,
    ) -> list[Prediction]:
        """Answer a list of (task, text) or (task, (text, text)), in the order asked.

        Args:
            requests: any number; an input may also be a dictionary with ``text`` and ``text_pair``, or with
                ``input_ids``, special tokens included. Memory beside the answers does not grow with it.
            truncation: cut what is longer than its task takes, as in training; else such a row is an error.
            truncation_side: where to cut, ``"left"`` or ``"right"``; None cuts where the tokenizer does.
            on_error: ``"return"`` puts a prediction with :attr:`Prediction.error` in the place of a row that cannot be
                answered (an unknown task, an empty text, ...); ``"raise"`` raises a ``UserError`` instead.
            aggregation_strategy, ignore_labels, stride: of tasks that label tokens; others have no use for them. See
                :class:`sparsepeft.inference.entities.EntityOptions`.
        """
        check_on_error(on_error)
        check_flag("truncation", truncation)
        check_truncation_side(truncation_side)
        options = entity_options(aggregation_strategy, ignore_labels, stride)
        _check_several(requests)
        answers: list[Prediction] = []
        with self._tasks.in_use() as tasks:
            for window in windows(as_list(requests), WINDOW):
                found = Answers(options)
                cutting = Cutting(truncation, truncation_side, stride)
                rows = self._encode(enumerate(window), tasks, cutting, on_error, found.predictions)
                for row, logits in self._run(rows):
                    found.put(row, logits)
                answers += [found.predictions[place] for place in range(len(window))]
        return answers

    @user_errors()
    def logits(self, name: str, texts: Iterable[Input]) -> np.ndarray:
        """(N, number of labels) of a task for texts, which may be empty where the tokenizer adds tokens of its own.

        Raises:
            UserError: the task is unknown or labels tokens, or an input is none of the task's.
        """
        with self._tasks.in_use() as tasks:
            task = find_task(name, tasks)
            if task.info.labels_tokens:
                raise InputError(
                    f"The logits of {name!r} were asked for, but it labels tokens, of which texts have different "
                    "numbers; ask predict for its entities."
                )
            inputs = [texts_of(text, task.info.num_texts, may_be_empty=True) for text in as_list(texts)]
            rows = [Row(place, task, one) for place, one in enumerate(task.encoder(inputs, task.max_length))]
            if not all(map(len, (row.encoded for row in rows))):
                raise InputError(NO_TOKENS)
            result = np.zeros((len(rows), task.info.num_outputs), dtype=np.float32)
            for row, logits in self._run(rows):
                result[row.place] = logits
        return result

    @user_errors()
    def token_logits(self, name: str, inputs: Sequence[dict[str, list[int]]]) -> list[np.ndarray]:
        """Logits (T, number of labels) of a task that labels tokens, for inputs that are encoded already.

        Args:
            name: of the task.
            inputs: of at most its longest input: ``input_ids``, ... of T tokens each, special ones included.

        Raises:
            UserError: the task is unknown, or labels texts.
        """
        with self._tasks.in_use() as tasks:
            task = find_task(name, tasks)
            if not task.info.labels_tokens:
                raise InputError(f"The logits of tokens of {name!r} were asked for, but it labels texts; ask logits.")
            rows = [Row(place, task, Encoded(features, False)) for place, features in enumerate(inputs)]
            found = {row.place: logits for row, logits in self._run(rows)}
        return [found[place] for place in range(len(rows))]

    def _encode(
        self,
        requests: Iterable[tuple[int, Request]],
        tasks: Mapping[str, LoadedTask],
        cutting: Cutting,
        on_error: OnError,
        failed: dict[int, Prediction],
    ) -> list[Row]:
        """Rows for the requests that can be answered; ``failed`` takes up the others, by their places."""
        readable: list[tuple[int, LoadedTask, tuple[str, ...]]] = []
        rows: list[Row] = []

        def refuse(place: int, error: InputError) -> None:
            if on_error == "raise":
                raise error
            failed[place] = Prediction.failed(str(error))

        for place, request in requests:
            try:
                name, text = _request(request)
                task = find_task(name, tasks)
                if isinstance(text, Mapping) and "input_ids" in text:
                    if task.info.labels_tokens:
                        raise InputError(
                            f"An input of {name!r} has input_ids, but the task says where in a text something is; pass "
                            "the text."
                        )
                    rows.append(Row(place, task, task.encoder.of_ids(text, task.max_length)))
                    continue
                texts = texts_of(text, task.info.num_texts)
                if task.info.labels_tokens and cutting.stride is not None:
                    parts = task.encoder.parts(texts[0], task.max_length, cutting.stride)
                    rows += [Row(place, task, one, part, len(parts)) for part, one in enumerate(parts)]
                else:
                    readable.append((place, task, texts))
            except InputError as error:
                refuse(place, error)

        def kind(one: tuple[int, LoadedTask, tuple[str, ...]]) -> tuple[Any, ...]:
            return one[1].encoder, len(one[2]), one[1].max_length, one[1].info.labels_tokens

        for alike in grouped(readable, kind):
            first = alike[0][1]
            encoder, longest = first.encoder, first.max_length
            texts_alike = [texts for _, _, texts in alike]
            encoded = encoder(texts_alike, longest, cutting.side, with_spans=first.info.labels_tokens)
            for (place, task, _), one in zip(alike, encoded, strict=True):
                if one.truncated and not cutting.allowed:
                    refuse(place, InputError(f"An input is longer than the {longest} tokens of its task; shorten it."))
                elif not len(one):
                    refuse(place, InputError(NO_TOKENS))
                else:
                    rows.append(Row(place, task, one))
        return rows

    def _run(self, rows: list[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Each row with its logits, see :func:`batch_logits`, in any order."""
        for alike in grouped(rows, lambda row: row.task.view):
            for batch in batches_by_length([len(row) for row in alike], self._token_budget, self._batch_size):
                # Rows of a task side by side, so that its adapter reads a slice.
                together = sorted((alike[i] for i in batch), key=lambda row: row.task.adapter_name)
                yield from zip(together, batch_logits(together), strict=True)


@torch.inference_mode()
def batch_logits(rows: list[Row], begin: int = 0, states: torch.Tensor | None = None) -> list[np.ndarray]:
    """Logits of rows of one model; from the layer ``begin`` on where ``states`` are given.

    Returns:
        For each row (num_labels,), or (T, num_labels) of its tokens where the task labels these. It has fewer columns
        where the model has fewer.
    """
    names = [row.task.adapter_name for row in rows]
    found = rows[0].task.view.logits(collate(rows), names, begin, states)
    of_texts = found.of_texts.float().cpu().numpy()
    of_tokens = iter(() if found.of_tokens is None else found.of_tokens.float().cpu().numpy())
    left = rows[0].task.encoder.tokenizer.padding_side == "left"
    logits: list[np.ndarray] = []
    for row, values in zip(rows, of_texts, strict=True):
        if row.task.info.labels_tokens:
            padded = next(of_tokens)
            values = padded[-len(row) :] if left else padded[: len(row)]
        # Tasks that share a model have as many columns as the one with the most labels.
        is_wider = row.task.view.is_shared and values.shape[-1] > row.task.info.num_outputs
        logits.append(values[..., : row.task.info.num_outputs] if is_wider else values)
    return logits


def try_out(task: LoadedTask) -> None:
    """A first pass by itself: weights that do not answer are found, and bottlenecks see how a layer ends.

    Raises:
        UserError: the model gives no logits for whole texts, or some that are not finite.
    """
    (probe,) = task.encoder([("a",) * (task.info.num_texts or 1)], task.max_length)
    (logits,) = batch_logits([Row(0, task, probe)])
    expected = task.info.num_outputs
    if logits.shape != ((len(probe), expected) if task.info.labels_tokens else (expected,)):
        raise UserError(
            f"The model gives logits of the shape {logits.shape} for one input of the task in {task.info.folder}, "
            f"which has {expected} output(s); pass a backbone as AutoModelForSequenceClassification loads it."
        )
    if not np.isfinite(logits).all():
        raise UserError(
            f"The weights in {task.info.folder} give logits that are not finite; train or copy the task again."
        )


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows of one model as tensors (B, T) on its device."""
    return rows[0].task.encoder.collate([row.encoded for row in rows], rows[0].task.view.device)


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Items with the same key together, in the order of first appearance."""
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _check_several(requests: Any) -> None:
    """Refuse one request, or a part of one, where a list of them is expected."""
    if isinstance(requests, (str, Mapping)) or (
        isinstance(requests, tuple) and requests and isinstance(requests[0], str)
    ):
        raise InputError(
            f"One request, {requests!r:.80}, was given; pass a list of them, such as [(task, text)], or ask all tasks "
            "by predict_all([text])."
        )


def _request(request: Any) -> Request:
    if not isinstance(request, (tuple, list)) or len(request) != 2 or not isinstance(request[0], str):
        raise InputError(
            f"A request is {request!r:.80}; expected (task, text) or (task, (text, text)), with the task's name."
        )
    return request[0], request[1]
