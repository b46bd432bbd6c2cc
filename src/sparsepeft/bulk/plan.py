"""What is done to every file: which tasks answer, on what backbone, and what an input is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sparsepeft.arguments import check_whole
from sparsepeft.backbones import public_name, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.folders import backbone_of_tasks
from sparsepeft.inference.portable import Prediction
from sparsepeft.inference.tasks import TaskInfo, check_weights, info_of_run, read_task
from sparsepeft.runs.files import RUN, columns_of, read_run, spec_of
from sparsepeft.scoring.answers import flat_cells
from sparsepeft.scoring.questions import TableOptions
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import Columns
from sparsepeft.tuners.config import DTYPES

_TEXTS = ("text", "text_pair")
_OF_ANSWERS = (".json", ".safetensors")  # endings of the files that a task's answers depend on


@dataclass(frozen=True)
class Plan:
    """Tasks that answer the same rows; what a worker needs to know.

    Attributes:
        tasks: by name; all of them read the same text, and tasks of pairs a second one.
        model: what the backbone is loaded from.
        spec: of an input: its columns, and whether a list of tokens is one.
        table: how files are read.
        dtype, device, token_budget: as for :class:`~sparsepeft.inference.MultiTaskEngine`.
        threads: of a process; None leaves PyTorch's.
    """

    tasks: dict[str, TaskInfo]
    model: str
    spec: TaskSpec
    table: TableOptions
    dtype: str
    device: str | None
    token_budget: int
    threads: int | None
    columns: ClassVar[Columns | None] = None  # `spec` has them

    @property
    def num_texts(self) -> int:
        """Texts that a row has, 1 or 2."""
        return len(self.spec.text_columns)

    def num_texts_of(self, task: str) -> int:
        """Texts that a task reads; one that takes one or two reads all there are."""
        return self.tasks[task].num_texts or self.num_texts

    def settings(self) -> dict[str, Any]:
        """What answers depend on: equal where they are."""
        return {
            "tasks": {name: _digest(info.folder) for name, info in self.tasks.items()},
            "model": public_name(self.model),
            "dtype": self.dtype,
            "text_column": self.table.text_column,
            "text_pair_column": self.table.text_pair_column,
            "delimiter": self.table.delimiter,
            "encoding": self.table.encoding,
        }


def make_plan(
    tasks: Mapping[str, str | Path],
    model: str | None = None,
    table: TableOptions | None = None,
    *,
    dtype: str = "fp32",
    device: str | None = None,
    token_budget: int = 4096,
    threads: int | None = None,
) -> Plan:
    """A plan, checked as far as can be without loading a model.

    Raises:
        UserError: there is no task, a folder cannot be used, the tasks read different columns, or two columns of their
            answers would have one name.
    """
    if not tasks:
        raise UserError("No task was given; pass the folder of at least one.")
    if dtype not in DTYPES:
        raise UserError(f"`dtype={dtype}` was given; pass {', '.join(DTYPES)}.")
    check_whole("token_budget", token_budget)
    if threads is not None:
        check_whole("threads", threads)
    table = table or TableOptions()
    folders = {name: Path(folder).absolute() for name, folder in tasks.items()}
    described = {name: _describe(folder) for name, folder in folders.items()}
    infos = {name: info for name, (info, _) in described.items()}
    own = 2 if table.text_pair_column is not None else 1  # of tasks that take one text or two
    num_texts = max(info.num_texts or own for info in infos.values())
    trained = {name: texts for name, (_, texts) in described.items() if texts}
    longest = max(trained.values(), key=len, default=())
    if table.text_column is None and (
        other := next((t for t in trained if trained[t] != longest[: len(trained[t])]), "")
    ):
        first = next(name for name, texts in trained.items() if texts == longest)
        raise UserError(
            f"The task {other!r} was trained on the column {trained[other][0]!r} and {first!r} on {longest[0]!r}, but "
            "all read the same; pass `text_column` (and `text_pair_column` for pairs)."
        )
    backbone = resolve_model(backbone_of_tasks(folders, model, must_exist=True))
    plan = Plan(
        infos,
        str(Path(backbone).absolute()) if Path(backbone).is_dir() else backbone,  # workers may be in another folder
        TaskSpec(
            name="bulk",
            text_columns=longest if len(longest) == num_texts else _TEXTS[:num_texts],
            label_names=None,
            metrics=(),
            main_metric="",
            paper_epochs=0,
            labels_tokens=any(info.labels_tokens for info in infos.values()),
        ),
        replace(table, label_column=None),
        dtype,
        device,
        token_budget,
        threads,
    )
    _check_names(infos)
    return plan


def joined(cells: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the answers of tasks add to a row, from what each of them adds by itself.

    Of several tasks each column has the task's name in front, but for ``error``: what the tasks say that could not
    answer, once where all say the same.
    """
    if len(cells) == 1:
        return next(iter(cells.values()))
    row = {f"{task}_{name}": value for task, own in cells.items() for name, value in own.items() if name != "error"}
    errors = {task: own["error"] for task, own in cells.items() if own.get("error") is not None}
    if any("error" in own for own in cells.values()):
        same = len(errors) == len(cells) and len(set(errors.values())) == 1
        parts = set(errors.values()) if same else [f"{task}: {error}" for task, error in errors.items()]
        row["error"] = " ".join(parts) or None
    return row


def flat_names(tasks: Mapping[str, TaskInfo]) -> list[str]:
    """Names of the columns that answers add to formats without nesting."""
    return list(joined({name: flat_cells(Prediction.failed(""), info) for name, info in tasks.items()}))


def _describe(folder: Path) -> tuple[TaskInfo, tuple[str, ...]]:
    """A task, and what its texts were called in training; nothing where the folder does not say."""
    if not (folder / RUN).is_file():
        return read_task(folder)[0], ()
    run = read_run(folder)
    info, columns = info_of_run(folder, run), columns_of(run)
    check_weights(folder)
    return info, spec_of(run).text_columns if columns is None else columns.texts


def _check_names(tasks: Mapping[str, TaskInfo]) -> None:
    by_task = {name: flat_cells(Prediction.failed(""), info) for name, info in tasks.items()}
    names = [f"{task}_{name}" for task, cells in by_task.items() for name in cells if name != "error"]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Two columns of the answers would be called {twice[0]!r}; give a task another name.")


def _digest(folder: Path) -> str:
    """SHA-256 of a task's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in _OF_ANSWERS and path.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
