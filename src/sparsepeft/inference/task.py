"""What the engine knows of a loaded task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, TaskType

from sparsepeft.errors import UserError
from sparsepeft.reprs import first_of
from sparsepeft.runs.files import RUN, read_run, spec_of
from sparsepeft.tuners.config import TaskAdapterConfig

if TYPE_CHECKING:
    from sparsepeft.inference.adapted import AdaptedBackbone


@dataclass(frozen=True)
class TaskInfo:
    """A task as its folder describes it.

    Attributes:
        folder: where its files are.
        label_names: by class index; None for regression.
        multi_label: whether several labels may hold at once.
        num_texts: texts per input, 1 or 2; None where the folder does not say, and both are taken.
        max_length: tokens an input was cut to in training; None for as many as the backbone takes.
    """

    folder: Path
    label_names: tuple[str, ...] | None
    multi_label: bool
    num_texts: int | None
    max_length: int | None

    def __repr__(self) -> str:
        labels = "a value" if self.label_names is None else f"labels: {first_of(self.label_names)}"
        return f"TaskInfo({str(self.folder)!r}, {labels})"


class LoadedTask:
    """A task's adapter in memory.

    Args:
        info: what the task is.
        model: which holds the adapter.
        adapter_name: under which name.
        max_length: tokens an input may have.
        lowest_layer: how many layers at the bottom the adapter leaves as they are.

    Attributes:
        users: calls that are using it.
    """

    def __init__(
        self, info: TaskInfo, model: AdaptedBackbone, adapter_name: str, max_length: int, lowest_layer: int
    ) -> None:
        self.info, self.model, self.adapter_name = info, model, adapter_name
        self.max_length, self.lowest_layer = max_length, lowest_layer
        self.users = 0


def read_task(folder: Path) -> tuple[TaskInfo, TaskAdapterConfig]:
    """Describe the task in a folder that ``sparsepeft train`` or ``save_pretrained`` wrote.

    Raises:
        UserError: the folder holds no adapter, one of a method that cannot share a batch, or its files disagree.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds no adapter (adapter_config.json is missing); pass the output folder of a finished "
            "`sparsepeft train` with an adapter method, or one written by save_pretrained."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"adapter_config.json in {folder} is damaged ({error}); save the adapter again.") from error
    if not isinstance(config, TaskAdapterConfig):
        raise UserError(
            f"{folder} holds an adapter of the method {_plain(config.peft_type).lower()}, whose tasks cannot share a "
            f"batch or a graph as those of spartan, pfeiffer, houlsby, bitfit and head can; {_alone(folder, config)}."
        )
    if config.task_type not in (None, TaskType.SEQ_CLS):
        raise UserError(
            f"{folder} holds an adapter for {_plain(config.task_type)}, but what is answered together are whole texts "
            f"({TaskType.SEQ_CLS.value}); {_alone(folder, config)}."
        )
    names = tuple(config.id2label[i] for i in range(len(config.id2label))) if config.id2label else ()
    if not names:
        raise UserError(f"{folder} holds an adapter without labels; the engine answers classification and regression.")
    is_regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    if is_regression and len(names) > 1:
        raise UserError(
            f"{folder} holds an adapter that predicts {len(names)} values at once, but an answer has labels or one "
            "value; take the logits of PeftModel.from_pretrained."
        )
    if not (folder / RUN).is_file():
        multi_label = config.problem_type == "multi_label_classification"
        return TaskInfo(folder, None if is_regression else names, multi_label, None, None), config
    run = read_run(folder)
    spec = spec_of(run)
    if spec.num_labels != config.num_labels:
        raise UserError(
            f"{folder} disagrees with itself: {RUN} names {spec.num_labels} label(s), but the head has "
            f"{config.num_labels} output(s); train the task again, or copy the folder whole."
        )
    info = TaskInfo(folder, spec.label_names, spec.multi_label, len(spec.text_columns), run["config"].get("max_length"))
    return info, config


def _plain(name: Any) -> str:
    """A member of one of PEFT's enums, or a name outside it, as its files have it."""
    return str(getattr(name, "value", name))


def _alone(folder: Path, config: PeftConfig) -> str:
    """What to do with an adapter that is answered by itself only."""
    if not (folder / RUN).is_file():
        return "use this one by itself, through PeftModel.from_pretrained"
    if config.task_type == TaskType.CAUSAL_LM:
        return (
            "it is a language model: continue texts with it by `sparsepeft generate` or sparsepeft.training.Generator"
        )
    return "answer this one by itself, with `sparsepeft predict` or sparsepeft.training.Predictor"
