"""Loaded tasks: what each is, and which of them calls still use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, TaskType

from sparsepeft.backbones import backbone_of_run
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.folders import UNFINISHED
from sparsepeft.inference.portable import check_task_name, find_task
from sparsepeft.inference.sentences import check_fast
from sparsepeft.methods.models import TrainedRun
from sparsepeft.reprs import first_of
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import RUN, read_run, spec_of, thresholds_of
from sparsepeft.spt.config import INFER
from sparsepeft.tuners.config import TaskAdapterConfig

if TYPE_CHECKING:
    from sparsepeft.inference.encoding import Encoder
    from sparsepeft.inference.views import View


@dataclass(frozen=True)
class TaskInfo:
    """A task as its folder describes it.

    Attributes:
        folder: where its files are.
        label_names: by class index; None for regression.
        multi_label: whether several labels may hold at once.
        num_texts: texts per input, 1 or 2; None where the folder does not say, and both are taken.
        max_length: tokens an input was cut to in training; None for as many as the backbone takes.
        labels_tokens: whether each token of a text has a label, and not the text.
        is_by_word: of such a task, whether the first token of a word was trained to speak for it.
        thresholds: where several labels may hold, the probability above which each does; None is 0.5 for all.
    """

    folder: Path
    label_names: tuple[str, ...] | None
    multi_label: bool
    num_texts: int | None
    max_length: int | None
    labels_tokens: bool = False
    is_by_word: bool = False
    thresholds: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        labels = "a value" if self.label_names is None else f"labels: {first_of(self.label_names)}"
        return f"TaskInfo({str(self.folder)!r}, {'tokens, ' if self.labels_tokens else ''}{labels})"

    @property
    def problem_type(self) -> str:
        """The kind of task, as transformers names it; ``"token_classification"`` where tokens are labelled."""
        if self.labels_tokens:
            return "token_classification"
        if self.label_names is None:
            return "regression"
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @property
    def num_outputs(self) -> int:
        """Logits of an input, or of each of its tokens."""
        return len(self.label_names) if self.label_names else 1


class LoadedTask:
    """A task in memory.

    Args:
        adapter_name: of its adapter in that model.
        encoder: the tokenizer of its backbone.
        lowest_layer: how many layers at the bottom compute the same as without the task's adapter.

    Attributes:
        max_length: tokens an input may have.
        num_users: calls that are using it.

    Raises:
        UserError: the task labels tokens, but the tokenizer cannot tell where they are.
    """

    def __init__(self, info: TaskInfo, view: View, adapter_name: str, encoder: Encoder, lowest_layer: int = 0) -> None:
        if info.labels_tokens:
            check_fast(encoder.tokenizer, f"{info.folder} holds a task that labels tokens")
        self.info, self.view, self.adapter_name, self.encoder = info, view, adapter_name, encoder
        self.max_length, self.lowest_layer = encoder.longest(info.max_length), lowest_layer
        self.num_users = 0


class TaskRegistry:
    """Tasks by name. A call works on the tasks as they were when it began; a change is one assignment.

    A task that was taken away is deleted from its model when the last call that uses it has ended.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, LoadedTask] = {}
        self._retired: list[LoadedTask] = []
        self._changing = threading.Lock()  # held while a task is loaded, or retired ones are deleted
        self._counting = threading.Lock()  # held for moments only, so that no call waits for a task to be loaded

    def now(self) -> dict[str, LoadedTask]:
        """The tasks at this moment."""
        with self._counting:
            return dict(self._tasks)

    @contextmanager
    def in_use(self) -> Iterator[dict[str, LoadedTask]]:
        """The tasks at this moment; none of them is deleted while this lasts."""
        with self._counting:
            tasks = dict(self._tasks)
            for task in tasks.values():
                task.num_users += 1
        try:
            yield tasks
        finally:
            with self._counting:
                for task in tasks.values():
                    task.num_users -= 1
            # Whoever is changing the tasks deletes what can be deleted at the end of the change.
            if self._retired and self._changing.acquire(blocking=False):
                try:
                    self._delete_retired()
                finally:
                    self._changing.release()

    def add(self, name: str, load: Callable[[], LoadedTask]) -> None:
        """Load a task under a name that is free.

        Raises:
            UserError: the name is taken.
            InputError: the name is no text.
        """
        check_task_name(name)
        with self._changing:
            if name in self._tasks:
                raise UserError(f"The task {name!r} is loaded already; call replace() to put another in its place.")
            self._put(name, load())

    def replace(self, name: str, load: Callable[[], LoadedTask | None]) -> None:
        """Load a task in place of one that is there; None forgets that one.

        Raises:
            InputError: there is none.
        """
        with self._changing:
            find_task(name, self._tasks)
            self._put(name, load())

    def _put(self, name: str, task: LoadedTask | None) -> None:
        with self._counting:
            if name in self._tasks:
                self._retired.append(self._tasks[name])
            if task is None:
                del self._tasks[name]
            else:
                self._tasks[name] = task
        self._delete_retired()

    def _delete_retired(self) -> None:
        with self._counting:
            unused = [task for task in self._retired if task.num_users == 0]
            self._retired = [task for task in self._retired if task.num_users > 0]
        for task in unused:
            task.view.delete(task.adapter_name)


def info_of_run(folder: Path, run: dict[str, Any]) -> TaskInfo:
    """The task of a run, from its ``run.json``.

    Raises:
        UserError: it is a language model.
    """
    if not isinstance(run["task"], dict):
        raise UserError(
            f"{folder} holds a language model, which has no labels to predict; `sparsepeft generate` continues texts "
            "with it, and `sparsepeft evaluate` gives its perplexity."
        )
    spec = spec_of(run)
    return TaskInfo(
        folder=folder,
        label_names=spec.label_names,
        multi_label=spec.multi_label,
        num_texts=len(spec.text_columns),
        max_length=run["config"].get("max_length"),
        labels_tokens=spec.labels_tokens,
        is_by_word=spec.labels_tokens,
        thresholds=thresholds_of(run),
    )


def check_weights(folder: Path) -> None:
    """See that a run's folder has weights.

    Raises:
        UserError: it has none.
    """
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no trained weights yet; finish its training by the same command.")


def trained_run(folder: Path, run: dict[str, Any], model: str | None = None, infer: str | None = None) -> TrainedRun:
    """What the model of a run is loaded from.

    Args:
        run: the content of its ``run.json``.
        model: the backbone, if it has moved since training.
        infer: how the model of a sparse run is to answer, see :class:`sparsepeft.spt.SptConfig`; None as in training.

    Raises:
        UserError: there are no weights yet, nothing is left where the backbone was, or ``infer`` cannot be had.
    """
    check_weights(folder)
    config = RunConfig(**run["config"])
    if infer is not None and infer not in INFER:
        raise UserError(unknown_name("`infer`", infer, INFER))
    if infer is not None and config.spt is None:
        raise UserError(f"`infer={infer}` was given, but the run in {folder} is of a dense model; leave it out.")
    backbone = str(folder) if config.method == "full" else backbone_of_run(folder, model, config.model)
    return TrainedRun(folder, config.method, backbone, config.spt is not None, run.get("backbone_fingerprint"), infer)


def read_task(folder: Path) -> tuple[TaskInfo, TaskAdapterConfig]:
    """Describe the task whose adapter is in a folder that ``sparsepeft train`` or ``save_pretrained`` wrote.

    Raises:
        UserError: there is no such folder, it holds no adapter, one of a method that cannot share a batch, or its files
            disagree.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; pass the output folder of a finished `sparsepeft train`.")
    if not (folder / "adapter_config.json").is_file():
        if (folder / UNFINISHED / RUN).is_file():
            read_run(folder)  # says what to do
        raise UserError(
            f"{folder} holds no adapter (adapter_config.json is missing); pass the output folder of a finished "
            "`sparsepeft train` with an adapter method, or one written by save_pretrained."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"adapter_config.json in {folder} is damaged ({error}); save the adapter again.") from error
    if config.task_type not in (None, TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        raise UserError(
            f"{folder} holds an adapter for {_plain(config.task_type)}, but what is answered together are tasks that "
            f"label texts or tokens ({TaskType.SEQ_CLS.value}, {TaskType.TOKEN_CLS.value}); use this one through "
            "PeftModel.from_pretrained."
        )
    if not isinstance(config, TaskAdapterConfig):
        raise UserError(
            f"{folder} holds an adapter of the method {_plain(config.peft_type).lower()}, whose tasks cannot share a "
            "batch or a graph as those of spartan, pfeiffer, houlsby, bitfit and head can; "
            + (
                "an engine answers it beside them, as does `sparsepeft predict`."
                if (folder / RUN).is_file()
                else "use this one, which says nothing of its labels, through PeftModel.from_pretrained."
            )
        )
    names = tuple(config.id2label[i] for i in range(len(config.id2label))) if config.id2label else ()
    if not names:
        raise UserError(f"{folder} holds an adapter without labels; the engine answers classification and regression.")
    labels_tokens, is_run = config.task_type == TaskType.TOKEN_CLS, (folder / RUN).is_file()
    if labels_tokens and not is_run:
        return TaskInfo(folder, names, multi_label=False, num_texts=1, max_length=None, labels_tokens=True), config
    if not labels_tokens and (repeated := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise UserError(
            f"{folder} holds an adapter with two labels named {repeated!r:.80}, but an answer has a score for each "
            "name; give each a name of its own in the id2label of adapter_config.json."
        )
    is_regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    if is_regression and len(names) > 1:
        raise UserError(
            f"{folder} holds an adapter that predicts {len(names)} values at once, but an answer has labels or one "
            "value; take the logits of PeftModel.from_pretrained."
        )
    if not is_run:
        multi_label = config.problem_type == "multi_label_classification"
        return TaskInfo(folder, None if is_regression else names, multi_label, None, None), config
    info = info_of_run(folder, read_run(folder))
    if info.num_outputs != config.num_labels:
        raise UserError(
            f"{folder} disagrees with itself: {RUN} names {info.num_outputs} label(s), but the head has "
            f"{config.num_labels} output(s); train the task again, or copy the folder whole."
        )
    return info, config


def _plain(name: Any) -> str:
    """A member of one of PEFT's enums, or a name outside it, as its files have it."""
    return str(getattr(name, "value", name))
