"""One backbone, many tasks, one call."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from sparsepeft.arguments import check_flag, check_whole
from sparsepeft.backbones import resolve_model
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError, first_line
from sparsepeft.inference.adapted import AdaptedBackbone, sharing_tensors
from sparsepeft.inference.batches import batches_by_tokens, windows
from sparsepeft.inference.encoding import Encoded, Encoder
from sparsepeft.inference.onednn import is_onednn_faster
from sparsepeft.inference.predictions import (
    Input,
    OnError,
    Prediction,
    check_on_error,
    listed,
    prediction,
    read_input,
    texts_of,
)
from sparsepeft.inference.registry import TaskRegistry, find
from sparsepeft.inference.task import LoadedTask, TaskInfo, read_task
from sparsepeft.methods.models import load_tokenizer, not_loaded, set_pad_token, with_pad_token
from sparsepeft.reprs import first_of
from sparsepeft.tuners.config import DTYPES
from sparsepeft.tuners.layer import execution_device

Request = tuple[str, Input]

_WINDOW = 4096  # inputs that are encoded and sorted by length at a time


@dataclass(frozen=True)
class _Row:
    """One input of one task: where its answer goes, and its tokens."""

    place: int
    task: LoadedTask
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded)


class MultiTaskEngine:
    """Answers many tasks from one copy of a backbone.

    A call takes inputs of any tasks. They are sorted by length and batched by a budget of tokens; each batch is one
    pass of the backbone in which every row uses its own task's adapter and head. Row by row the answers are those of
    the task alone. Calls may run in several threads, and tasks may be added, replaced and removed meanwhile: a call
    uses the tasks as they were when it began, the next call sees the change.

    Args:
        backbone: a hub id, a local folder, or a loaded model with a classification head (it is not changed, and its
            weights are shared); None is the bundled MiniLM.
        tasks: folder of each task by its name, as written by ``sparsepeft train`` or ``save_pretrained``. SPARTAN,
            bottleneck, BitFit and head-only tasks may be mixed; those of different PEFT methods do not share a batch.
        tokenizer: None takes the backbone's.
        dtype: of the backbone where it is loaded here, as PyTorch's or by name (``"bf16"``). In bfloat16 a pass takes
            about a third of the time on processors that multiply it; adapters and heads stay in float32.
        device: where to compute; None leaves a loaded model where it is.
        token_budget: tokens of a batch, padding included; may be changed between calls.
        onednn: compute linear layers on a CPU by oneDNN's operator for them; None compares it with PyTorch's own choice
            when the first task is loaded, and takes the faster one.

    Raises:
        UserError: the backbone or a task cannot be loaded; the message says which and why.
    """

    def __init__(
        self,
        backbone: str | Path | PreTrainedModel | None = None,
        tasks: Mapping[str, str | Path] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        token_budget: int = 4096,
        onednn: bool | None = None,
    ) -> None:
        self.token_budget = token_budget
        if onednn is not None:
            check_flag("onednn", onednn)
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"`tokenizer` is {tokenizer!r:.80} ({type(tokenizer).__name__}); expected a loaded tokenizer, as "
                "AutoTokenizer.from_pretrained gives it, or None for the backbone's."
            )
        torch_dtype = _dtype(dtype)
        if tasks is not None and not isinstance(tasks, Mapping):
            raise UserError(
                f"`tasks` is {tasks!r:.80} ({type(tasks).__name__}); expected the folder of each task by its name, "
                'such as {"sst2": "out/sst2"}.'
            )
        place = None if device is None else find_device(str(device))
        if isinstance(backbone, PreTrainedModel):
            model = sharing_tensors(backbone)
        else:
            model = load_backbone(resolve_model(None if backbone is None else str(backbone)), torch_dtype)
        if tokenizer is None:
            tokenizer = load_tokenizer(str(model.name_or_path))
        else:
            tokenizer = with_pad_token(copy.deepcopy(tokenizer))
        set_pad_token(model, tokenizer)
        if place is not None:
            _move(model, place)
        self._backbone, self._device = model, execution_device(model) or model.device
        self._encoder = Encoder(tokenizer, model.config)
        self._onednn = onednn
        self._models: dict[str, AdaptedBackbone] = {}  # by PEFT method
        self._tasks = TaskRegistry()
        self._numbers = itertools.count()
        for task, folder in (tasks or {}).items():
            self.add(task, folder)

    def __repr__(self) -> str:
        names = self.tasks
        tasks = f"{len(names)} task{'s' * (len(names) != 1)}" + (f": {first_of(names)}" if names else "")
        dtype = str(self._backbone.dtype).removeprefix("torch.")
        return f"MultiTaskEngine({Path(str(self._backbone.name_or_path)).name!r}, {dtype} on {self._device}, {tasks})"

    @property
    def token_budget(self) -> int:
        """Tokens of a batch, padding included."""
        return self._token_budget

    @token_budget.setter
    def token_budget(self, value: int) -> None:
        self._token_budget = check_whole("token_budget", value)

    # -- tasks -------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """The loaded tasks."""
        return {name: task.info for name, task in self._tasks.now().items()}

    def add(self, name: str, folder: str | Path) -> None:
        """Load a task under a new name.

        Raises:
            UserError: the name is taken or no text, or the folder cannot be used; the engine is as before.
        """
        path = _path(folder)
        self._tasks.add(name, lambda: self._load(path))

    def replace(self, name: str, folder: str | Path) -> None:
        """Put another version of a task in its place; calls that run finish with the former one.

        Raises:
            UserError: there is no such task, or the folder cannot be used; the former version stays.
        """
        path = _path(folder)
        self._tasks.replace(name, lambda: self._load(path))

    def remove(self, name: str) -> None:
        """Forget a task; calls that run finish with it.

        Raises:
            UserError: there is no such task.
        """
        self._tasks.remove(name)

    def _load(self, folder: Path) -> LoadedTask:
        info, config = read_task(folder)
        method = config.method
        onednn = is_onednn_faster(self._backbone.dtype) if self._onednn is None else self._onednn
        model = self._models.get(method) or AdaptedBackbone(self._backbone, onednn=onednn)
        adapter_name, longest = f"task{next(self._numbers)}", self._encoder.longest(info.max_length)
        task = LoadedTask(info, model, adapter_name, longest, model.load(folder, adapter_name))
        try:
            self._try_out(task, config.num_labels)
        except BaseException:
            model.delete(adapter_name)
            raise
        self._models[method] = model
        return task

    def _try_out(self, task: LoadedTask, num_labels: int | None) -> None:
        """A first pass by itself: weights that are not finite are found, and bottlenecks see how a layer ends."""
        (probe,) = self._encoder([("a",) * (task.info.num_texts or 1)], task.max_length)
        if not np.isfinite(self._logits([_Row(0, task, probe)])[0, :num_labels]).all():
            raise UserError(
                f"The weights in {task.info.folder} give logits that are not finite; train or copy the task again."
            )

    # -- answers -----------------------------------------------------------------------------------------------------

    def predict(
        self, requests: Iterable[Request], *, truncation: bool = True, on_error: OnError = "return"
    ) -> list[Prediction]:
        """Answer a list of (task, text) or (task, (text, text)), in the order asked.

        Args:
            requests: any number; an input may also be a dictionary with ``text`` and ``text_pair``. Memory beside the
                answers does not grow with it.
            truncation: cut what is longer than its task takes, as in training; else such a row is an error.
            on_error: ``"return"`` puts a prediction with :attr:`Prediction.error` in the place of a row that cannot be
                answered (an unknown task, an empty text, ...); ``"raise"`` raises a ``UserError`` instead.
        """
        check_on_error(on_error)
        check_flag("truncation", truncation)
        _check_several(requests)
        answers: list[Prediction] = []
        with self._tasks.in_use() as tasks:
            for window in windows(listed(requests), _WINDOW):
                found: dict[int, Prediction] = {}
                rows = self._encode(enumerate(window), tasks, truncation, on_error, found)
                for same in _grouped(rows, lambda row: row.task.model):
                    for batch in batches_by_tokens([len(row) for row in same], self.token_budget):
                        # Rows of a task side by side, so that its adapter reads a slice.
                        together = sorted((same[i] for i in batch), key=lambda row: row.task.adapter_name)
                        for row, logits in zip(together, self._logits(together), strict=True):
                            found[row.place] = _answer(row, logits)
                answers += [found[place] for place in range(len(window))]
        return answers

    def predict_all(
        self,
        texts: Iterable[Input],
        tasks: Sequence[str] | None = None,
        *,
        truncation: bool = True,
        on_error: OnError = "return",
    ) -> list[dict[str, Prediction]]:
        """Answer several tasks for each input, given as for :meth:`predict`.

        The layers below the lowest adapter of the tasks (``layers_to_transform``) run once for a text, the others once
        for each task.

        Args:
            texts: any number; memory beside the answers does not grow with it.
            tasks: which; None for all that take as many texts as an input has.
            truncation, on_error: as for :meth:`predict`.

        Returns:
            For each input the predictions by task.

        Raises:
            UserError: ``tasks`` names one that is not loaded.
        """
        check_on_error(on_error)
        check_flag("truncation", truncation)
        answers: list[dict[str, Prediction]] = []
        with self._tasks.in_use() as loaded:
            names = loaded if tasks is None else listed(tasks)
            chosen = {name: find(loaded, name) for name in names}
            for window in windows(listed(texts), _WINDOW):
                found: dict[tuple[str, int], Prediction] = {}
                for group in _grouped(chosen.items(), lambda named: _shareable(named[1])):
                    first, task = group[0]
                    fitting = [
                        (place, (first, text))
                        for place, text in enumerate(window)
                        if tasks is not None or _fits(text, task)
                    ]
                    failed: dict[int, Prediction] = {}
                    rows = self._encode(fitting, chosen, truncation, on_error, failed)
                    found |= {(name, place): answer for place, answer in failed.items() for name, _ in group}
                    for batch in batches_by_tokens([len(row) for row in rows], self.token_budget):
                        found |= self._fan_out([rows[i] for i in batch], group)
                answers += [
                    {name: found[name, place] for name in chosen if (name, place) in found}
                    for place in range(len(window))
                ]
        return answers

    def _encode(
        self,
        requests: Iterable[tuple[int, Request]],
        tasks: Mapping[str, LoadedTask],
        truncation: bool,
        on_error: OnError,
        failed: dict[int, Prediction],
    ) -> list[_Row]:
        """Rows for the requests that can be answered; ``failed`` takes up the others, by their places."""
        good: list[tuple[int, str, tuple[str, ...]]] = []

        def refuse(place: int, error: UserError) -> None:
            if on_error == "raise":
                raise error
            failed[place] = Prediction.failed(str(error))

        for place, request in requests:
            try:
                name, text = _request(request)
                good.append((place, name, texts_of(text, find(tasks, name).info.num_texts)))
            except UserError as error:
                refuse(place, error)
        rows: list[_Row] = []
        for same in _grouped(good, lambda one: (len(one[2]), tasks[one[1]].max_length)):
            longest = tasks[same[0][1]].max_length
            encoded = self._encoder([texts for _, _, texts in same], longest)
            for (place, name, _), one in zip(same, encoded, strict=True):
                if one.truncated and not truncation:
                    refuse(place, UserError(f"An input is longer than the {longest} tokens of its task; shorten it."))
                elif not len(one):
                    refuse(place, UserError("An input has no character that the tokenizer knows; pass some words."))
                else:
                    rows.append(_Row(place, tasks[name], one))
        return rows

    @torch.inference_mode()
    def _fan_out(self, rows: list[_Row], tasks: list[tuple[str, LoadedTask]]) -> dict[tuple[str, int], Prediction]:
        """Answer all ``tasks`` for each of the rows, the lower layers once; by task and place."""
        model = tasks[0][1].model
        shared = min(model.num_shareable_layers, *(task.lowest_layer for _, task in tasks))
        states = model.lower_states(self._collate(rows), shared) if shared else None
        found: dict[tuple[str, int], Prediction] = {}
        for part in windows(tasks, max(1, self.token_budget // (len(rows) * max(map(len, rows))))):
            repeated = [replace(row, task=task) for _, task in part for row in rows]
            logits = self._logits(repeated, shared, None if states is None else states.repeat(len(part), 1, 1))
            names = [name for name, _ in part for _ in rows]
            for name, row, values in zip(names, repeated, logits, strict=True):
                found[name, row.place] = _answer(row, values)
        return found

    @torch.inference_mode()
    def _logits(self, rows: list[_Row], begin: int = 0, states: torch.Tensor | None = None) -> np.ndarray:
        """Logits of rows of one model, (B, most labels); from the layer ``begin`` on where ``states`` are given."""
        names = [row.task.adapter_name for row in rows]
        logits = rows[0].task.model.logits(self._collate(rows), names, begin, states)
        result: np.ndarray = logits.float().cpu().numpy()
        return result

    def _collate(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        return self._encoder.collate([row.encoded for row in rows], self._device)


def load_backbone(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A backbone with a classification head, from a hub id or a folder.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("model", name, error)) from error


def _dtype(given: Any) -> torch.dtype:
    """A dtype that a backbone can have, given as PyTorch's or by its name."""
    dtype = getattr(torch, DTYPES[given]) if isinstance(given, str) and given in DTYPES else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"`dtype={given!r}` was given; expected torch.float32, torch.bfloat16, fp32, bf16 or fp16.")
    return dtype


def _path(folder: Any) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise UserError(
            f"A task's folder is {folder!r:.80} ({type(folder).__name__}); expected a path, such as 'out/sst2'."
        ) from None


def _move(model: torch.nn.Module, device: torch.device) -> None:
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(
            f"`device={device}` was given, but accelerate decides where the parts of this model compute; leave "
            "device out."
        )
    try:
        model.to(device)
    except (RuntimeError, ValueError) as error:  # such as too little memory, or quantized weights that stay
        raise UserError(f"The model cannot be moved to `device={device}` ({first_line(error)}).") from error


def _check_several(requests: Any) -> None:
    """Refuse one request, or a part of one, where a list of them is expected."""
    if isinstance(requests, (str, Mapping)) or (
        isinstance(requests, tuple) and requests and isinstance(requests[0], str)
    ):
        raise UserError(
            f"One request, {requests!r:.80}, was given; pass a list of them, such as [(task, text)], or ask all tasks "
            "by predict_all([text])."
        )


def _request(request: Any) -> Request:
    if not isinstance(request, (tuple, list)) or len(request) != 2 or not isinstance(request[0], str):
        raise UserError(
            f"A request is {request!r:.80}; expected (task, text) or (task, (text, text)), with the task's name."
        )
    return request[0], request[1]


def _grouped(items: Iterable[Any], key: Any) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _shareable(task: LoadedTask) -> tuple[Any, ...]:
    """What tasks must have in common to be answered for one text together."""
    return task.model, task.info.num_texts, task.max_length, task.lowest_layer > 0


def _fits(text: Any, task: LoadedTask) -> bool:
    try:
        return task.info.num_texts in (None, len(read_input(text)))
    except UserError:
        return True  # what is wrong with it is every task's answer


def _answer(row: _Row, logits: np.ndarray) -> Prediction:
    names = row.task.info.label_names
    own = logits[: len(names) if names else 1]
    return prediction(own, names, multi_label=row.task.info.multi_label, truncated=row.encoded.truncated)
