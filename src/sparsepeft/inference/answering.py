"""From requests to predictions: encode, batch, route each row to its task's model, decode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sparsepeft.arguments import check_flag
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Encoded, batches_by_length, windows
from sparsepeft.inference.portable import (
    NO_TOKENS,
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
    """What happens to an input that is too long: whether it may be cut, and where."""

    allowed: bool
    side: TruncationSide | None = None


@dataclass(frozen=True)
class Row:
    """One input of one task: where its answer goes, and its tokens."""

    place: int
    task: LoadedTask
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def answer(self, logits: np.ndarray) -> Prediction:
        """The prediction that logits (most labels,) of a batch's row stand for."""
        info = self.task.info
        options: dict[str, Any] = {
            "multi_label": info.multi_label,
            "truncated": self.encoded.truncated,
            "num_tokens": len(self),
        }
        return prediction(logits[: info.num_outputs], info.label_names, **options)


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
    ) -> list[Prediction]:
        """Answer a list of (task, text) or (task, (text, text)), in the order asked.

        Args:
            requests: any number; an input may also be a dictionary with ``text`` and ``text_pair``, or with
                ``input_ids``, special tokens included. Memory beside the answers does not grow with it.
            truncation: cut what is longer than its task takes, as in training; else such a row is an error.
            truncation_side: where to cut, ``"left"`` or ``"right"``; None cuts where the tokenizer does.
            on_error: ``"return"`` puts a prediction with :attr:`Prediction.error` in the place of a row that cannot be
                answered (an unknown task, an empty text, ...); ``"raise"`` raises a ``UserError`` instead.
        """
        check_on_error(on_error)
        check_flag("truncation", truncation)
        check_truncation_side(truncation_side)
        _check_several(requests)
        answers: list[Prediction] = []
        with self._tasks.in_use() as tasks:
            for window in windows(as_list(requests), WINDOW):
                predictions: dict[int, Prediction] = {}
                cutting = Cutting(truncation, truncation_side)
                rows = self._encode(enumerate(window), tasks, cutting, on_error, predictions)
                for row, logits in self._run(rows):
                    predictions[row.place] = row.answer(logits)
                answers += [predictions[place] for place in range(len(window))]
        return answers

    @user_errors()
    def logits(self, name: str, texts: Iterable[Input]) -> np.ndarray:
        """(N, number of labels) of a task for texts, which may be empty.

        Raises:
            UserError: the task is unknown, or an input is none of the task's.
        """
        with self._tasks.in_use() as tasks:
            task = find_task(name, tasks)
            inputs = [texts_of(text, task.info.num_texts, may_be_empty=True) for text in as_list(texts)]
            rows = [Row(place, task, one) for place, one in enumerate(task.encoder(inputs, task.max_length))]
            result = np.zeros((len(rows), task.info.num_outputs), dtype=np.float32)
            for row, logits in self._run(rows):
                result[row.place] = logits[: result.shape[1]]
        return result

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
                    rows.append(Row(place, task, task.encoder.of_ids(text, task.max_length)))
                else:
                    readable.append((place, task, texts_of(text, task.info.num_texts)))
            except InputError as error:
                refuse(place, error)
        for alike in grouped(readable, lambda one: (one[1].encoder, len(one[2]), one[1].max_length)):
            encoder, longest = alike[0][1].encoder, alike[0][1].max_length
            encoded = encoder([texts for _, _, texts in alike], longest, cutting.side)
            for (place, task, _), one in zip(alike, encoded, strict=True):
                if one.truncated and not cutting.allowed:
                    refuse(place, InputError(f"An input is longer than the {longest} tokens of its task; shorten it."))
                elif not len(one):
                    refuse(place, InputError(NO_TOKENS))
                else:
                    rows.append(Row(place, task, one))
        return rows

    def _run(self, rows: list[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Each row with its logits, (most labels,), in any order."""
        for alike in grouped(rows, lambda row: row.task.view):
            for batch in batches_by_length([len(row) for row in alike], self._token_budget, self._batch_size):
                # Rows of a task side by side, so that its adapter reads a slice.
                together = sorted((alike[i] for i in batch), key=lambda row: row.task.adapter_name)
                yield from zip(together, batch_logits(together), strict=True)


@torch.inference_mode()
def batch_logits(rows: list[Row], begin: int = 0, states: torch.Tensor | None = None) -> np.ndarray:
    """Logits of rows of one model, (B, most labels); from the layer ``begin`` on where ``states`` are given."""
    names = [row.task.adapter_name for row in rows]
    logits = rows[0].task.view.logits(collate(rows), names, begin, states)
    return logits.float().cpu().numpy()


def try_out(task: LoadedTask) -> None:
    """A first pass by itself: weights that do not answer are found, and bottlenecks see how a layer ends.

    Raises:
        UserError: the model gives no logits for whole texts, or some that are not finite.
    """
    (probe,) = task.encoder([("a",) * (task.info.num_texts or 1)], task.max_length)
    logits, expected = batch_logits([Row(0, task, probe)]), task.info.num_outputs
    # Tasks that share a model have as many columns as the one with the most labels.
    fits = logits.ndim == 2 and (logits.shape[1] >= expected if task.view.is_shared else logits.shape[1] == expected)
    if not fits:
        raise UserError(
            f"The model gives logits of the shape {logits.shape} for one input of the task in {task.info.folder}, "
            f"which has {expected} output(s); pass a backbone as AutoModelForSequenceClassification loads it."
        )
    if not np.isfinite(logits[0, :expected]).all():
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
