"""The adapted model as one graph whose inputs are token ids and every tensor of an adapter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from transformers import PreTrainedModel

from sparsepeft.errors import RunFailed, first_line
from sparsepeft.export.tasks import ExportTask, Shape, Tensors
from sparsepeft.layers import SparseMemory
from sparsepeft.methods.models import loading_adapter
from sparsepeft.models.heads import HeadModule
from sparsepeft.models.token_heads import TOKEN_HEAD, TokenHeads
from sparsepeft.tuners.files import saved_names

_BATCH, _LENGTH = 3, 7  # of the traced example; any numbers above 1 that differ from the model's own sizes


class TaskGraph:
    """The backbone with the adapters of all tasks, and the function that a graph is made of.

    Args:
        backbone: it is changed: adapters stand in it from now on.
        tasks: of one method.

    Attributes:
        tensors: of each task, by their names in the graph (see :func:`sparsepeft.export.tasks.file_name`), in float32.

    Raises:
        UserError: a task's files are damaged, or belong to another backbone.
    """

    def __init__(self, backbone: PreTrainedModel, tasks: Sequence[ExportTask]) -> None:
        names = [f"task{index}" for index in range(len(tasks))]
        kinds = [task.info.labels_tokens for task in tasks]
        heads = TokenHeads(backbone) if any(kinds) else None
        peft: PeftModel | None = None
        for name, task in zip(names, tasks, strict=True):
            with loading_adapter(task.info.folder):
                if heads is not None:
                    peft, _ = heads.attach(peft, task.info.folder, name)
                elif peft is None:
                    peft = PeftModel.from_pretrained(backbone, str(task.info.folder), adapter_name=name)
                else:
                    peft.load_adapter(str(task.info.folder), adapter_name=name)
        assert peft is not None
        active = names[kinds.index(False)] if False in kinds else names[0]
        peft.set_adapter(active)
        self.model: Any = peft.get_base_model().eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, SparseMemory):
                module.impl = "auto"  # which, while exporting, never means an operator that runtimes do not know
        state = dict(self.model.named_parameters())
        saved = dict(zip(names, (saved_names(self.model, name) for name in names), strict=True))
        self._targets = {key: target for key, (target, _) in saved[active].items()}
        if heads is not None:  # a head for tokens, of another task than the active one if that labels texts
            labels_tokens = names[kinds.index(True)]
            for module in self.model.get_submodule(TOKEN_HEAD).modules():
                if isinstance(module, HeadModule):
                    module.set_adapter(labels_tokens, inference_mode=True)
            of_tokens = (each for each in saved[labels_tokens].items() if each[0].startswith(f"{TOKEN_HEAD}."))
            self._targets |= {key: target for key, (target, _) in of_tokens}
        self._answer = _Answer(self.model, heads)
        self.tensors: list[Tensors] = [
            {key: state[target].float() for key, (target, _) in of_task.items()} for of_task in saved.values()
        ]

    def trace(
        self,
        inputs: Sequence[str],
        shapes: Mapping[str, Shape],
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> ExportedProgram:
        """The function ``(inputs by name, tensors by name) -> logits``, and logits of tokens if a task labels some.

        Args:
            inputs: names of the model's inputs, each integers (B, T).
            shapes: of the adapter's tensors; None where the size is open.
            batch_size: B; None for any.
            max_length: for runtimes that plan their memory ahead: the largest T, and no open size of a tensor is larger
                than with these tasks. None for no limit.

        Raises:
            RunFailed: ``torch.export`` cannot trace this model, or not with open sizes.
        """
        example = _example(inputs, batch_size)
        any_batch = {} if batch_size else {0: Dim.DYNAMIC}
        open_sizes = {name: {**any_batch, 1: _open(max_length)} for name in inputs}
        # Of an open size, the largest: it is above 1, which torch.export would take for a constant.
        largest = {}
        for name in shapes:
            sizes = zip(*(tensors[name].shape for tensors in self.tensors if name in tensors), strict=True)
            largest[name] = torch.zeros([max(of_dim) for of_dim in sizes])
        open_shapes = {
            name: {
                dim: _open(largest[name].shape[dim] if max_length else None)
                for dim, size in enumerate(shape)
                if size is None
            }
            for name, shape in shapes.items()
        }
        with torch.no_grad():
            self.model(**example)  # adapters that find their place in the first pass have found it
        return _trace(_Function(self._answer, self._targets), (example, largest), (open_sizes, open_shapes))


def trace_alone(model: nn.Module, inputs: Sequence[str]) -> ExportedProgram:
    """A model without adapters as the function ``inputs by name -> logits``, for any batch size and length.

    Raises:
        RunFailed: ``torch.export`` cannot trace this model.
    """
    open_sizes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    return _trace(_Function(_Answer(model), {}), (_example(inputs), {}), (open_sizes, {}))


def _trace(function: _Function, example: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    try:
        with torch.no_grad(), quiet():  # torch and transformers warn of each other
            return torch.export.export(function, example, dynamic_shapes=dynamic_shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's own errors are RuntimeErrors
        raise RunFailed(
            f"torch.export could not trace {type(function.answer.model).__name__} ({first_line(error)}); models of "
            "this class cannot be exported with the installed versions."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks of exporters and quantizers from the screen: warnings, and what is logged below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _example(inputs: Sequence[str], batch_size: int | None = None) -> Tensors:
    # A tensor for each: of one that is given twice, torch.export makes one input.
    return {name: torch.ones(batch_size or _BATCH, _LENGTH, dtype=torch.long) for name in inputs}


def _open(largest: int | None) -> Any:
    return Dim.DYNAMIC if largest is None else Dim.DYNAMIC(max=largest)


class _Answer(nn.Module):
    """A model's logits, and beside them those of tokens where there are heads for these."""

    def __init__(self, model: nn.Module, heads: TokenHeads | None = None) -> None:
        super().__init__()
        self.model, self._heads = model, heads

    def forward(self, **inputs: torch.Tensor) -> Any:
        if self._heads is None:
            return self.model(**inputs).logits
        with self._heads.noting(True):
            of_texts = self.model(**inputs).logits
        return of_texts, self._heads.logits()


class _Function(nn.Module):
    """What answers as a function of the model's inputs and of its tensors named in ``targets``."""

    def __init__(self, answer: _Answer, targets: Mapping[str, str]) -> None:
        super().__init__()
        self.answer, self.targets = answer, {name: f"model.{target}" for name, target in targets.items()}

    def forward(self, inputs: Tensors, tensors: Tensors) -> Any:
        by_target = {self.targets[name]: tensor for name, tensor in tensors.items()}
        return functional_call(self.answer, by_target, (), inputs)
