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
from sparsepeft.tuners.files import saved_names

_BATCH, _LENGTH = 3, 7  # of the traced example; any numbers above 1 that differ from the model's own sizes


class TaskGraph:
    """The backbone with the adapters of all tasks, and the function that a graph is made of.

    Args:
        backbone: it is changed: adapters stand in it from now on.
        tasks: of one method.

    Attributes:
        tensors: of each task, by the names they have in its file (without PEFT's prefix), in float32.

    Raises:
        UserError: a task's files are damaged, or belong to another backbone.
    """

    def __init__(self, backbone: PreTrainedModel, tasks: Sequence[ExportTask]) -> None:
        names = [f"task{index}" for index in range(len(tasks))]
        peft: PeftModel | None = None
        for name, task in zip(names, tasks, strict=True):
            with loading_adapter(task.info.folder):
                if peft is None:
                    peft = PeftModel.from_pretrained(backbone, str(task.info.folder), adapter_name=name)
                else:
                    peft.load_adapter(str(task.info.folder), adapter_name=name)
        assert peft is not None
        peft.set_adapter(names[0])
        self.model: Any = peft.get_base_model().eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, SparseMemory):
                module.impl = "auto"  # which, while exporting, never means an operator that runtimes do not know
        state = dict(self.model.named_parameters())
        self._targets = {saved: target for saved, (target, _) in saved_names(self.model, names[0]).items()}
        self.tensors: list[Tensors] = [
            {saved: state[target].float() for saved, (target, _) in saved_names(self.model, name).items()}
            for name in names
        ]

    def trace(
        self,
        inputs: Sequence[str],
        shapes: Mapping[str, Shape],
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> ExportedProgram:
        """The function ``(inputs by name, tensors by name) -> logits``.

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
            sizes = zip(*(tensors[name].shape for tensors in self.tensors), strict=True)
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
        return _trace(_Function(self.model, self._targets), (example, largest), (open_sizes, open_shapes))


def trace_alone(model: nn.Module, inputs: Sequence[str]) -> ExportedProgram:
    """A model without adapters as the function ``inputs by name -> logits``, for any batch size and length.

    Raises:
        RunFailed: ``torch.export`` cannot trace this model.
    """
    open_sizes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    return _trace(_Function(model, {}), (_example(inputs), {}), (open_sizes, {}))


def _trace(function: _Function, example: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    try:
        with torch.no_grad(), quiet():  # torch and transformers warn of each other
            return torch.export.export(function, example, dynamic_shapes=dynamic_shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's own errors are RuntimeErrors
        raise RunFailed(
            f"torch.export could not trace {type(function.model).__name__} ({first_line(error)}); models of this class "
            "cannot be exported with the installed versions."
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


class _Function(nn.Module):
    """The model as a function of its inputs and of the tensors named in ``targets``."""

    def __init__(self, model: nn.Module, targets: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self.targets = model, dict(targets)

    def forward(self, inputs: Tensors, tensors: Tensors) -> torch.Tensor:
        by_target = {self.targets[name]: tensor for name, tensor in tensors.items()}
        return functional_call(self.model, by_target, (), inputs).logits
