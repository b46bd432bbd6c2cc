"""What a task starts from where its checkpoint was fine-tuned as a classifier: rows of that head, by label names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsepeft.errors import UserError
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.head_search import find_head
from sparsepeft.models.identity import is_loaded


@dataclass(frozen=True)
class HeadStart:
    """How a checkpoint's output layer becomes the task's.

    Attributes:
        rows: of the checkpoint's output layer, one for each label of the task; None takes them as they are, where there
            are as many.
        note: set where the layer was trained for other labels, so that a fresh one takes its place.
    """

    rows: tuple[int, ...] | None = None
    note: str | None = None


def head_start(checkpoint: Mapping[int, str], task: Sequence[str] | None) -> HeadStart:
    """Match a task's labels to a checkpoint's by name, whatever the case.

    Names that say nothing (``LABEL_0``, or the index itself) are matched by index.

    Args:
        checkpoint: ``id2label`` of its config.
        task: names of the task's labels; None for regression, whose one output has no name.
    """
    if task is None:
        return HeadStart()
    names = [checkpoint[index] for index in sorted(checkpoint)]
    rows = {_plain(name): row for row, name in enumerate(names)}
    if len(rows) == len(names) and all(_plain(name) in rows for name in task):
        matched = tuple(rows[_plain(name)] for name in task)
        return HeadStart(None if matched == tuple(range(len(names))) else matched)
    if _says_nothing(names) or _says_nothing(task):
        return HeadStart()
    others = ", ".join(names[:5]) + (", ..." if names[5:] else "")
    return HeadStart(
        note=f"the checkpoint's head was trained for other labels ({others}): the task starts from a fresh one"
    )


@torch.no_grad()
def start_head(model: PreTrainedModel, start: HeadStart, names: Mapping[int, str]) -> None:
    """Give the output layer of a model that was loaded for its own labels those of the task.

    Args:
        model: with the checkpoint's number of labels where rows are picked, else with the task's.

    Raises:
        UserError: rows are to be picked, but no layer of the head has one for each label.
    """
    if start == HeadStart():
        return
    head = find_head(model, find_blocks(model))
    if head.output is None:
        raise UserError(
            f"The checkpoint's labels are in another order than the task's, but in the head of {type(model).__name__} "
            "no layer has one output for each; pass a checkpoint without a head."
        )
    layer = model.get_submodule(".".join(filter(None, (head.output, head.linear))))
    assert isinstance(layer, nn.Linear)  # as find_head says
    if start.rows is not None:
        for parameter in layer.parameters():
            parameter.data = parameter.data[list(start.rows)]
        layer.out_features = len(start.rows)
        labelled: Any = model
        labelled.config.id2label = dict(names)  # which sets the config's num_labels
        labelled.config.label2id = {label: index for index, label in names.items()}
        labelled.num_labels = len(names)
    elif is_loaded(layer.weight):  # else it is fresh already
        nn.init.normal_(layer.weight, std=getattr(model.config, "initializer_range", 0.02))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def _says_nothing(names: Sequence[str]) -> bool:
    return all(_plain(name) in (f"label {index}", str(index)) for index, name in enumerate(names))
