"""Training memories with gradients of the cells that were read: who gets them, their norm, and the trainer for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from sparsepeft.errors import UserError
from sparsepeft.layers import SparseMemory
from sparsepeft.training.lazy_adamw import LazyAdamW, coalesced, holds_rows

# Cells of a memory from which a step that touches all of them costs more than finding those that were read.
_MANY_CELLS = 1 << 14


class SparseGradientTrainer(Trainer):
    """``transformers.Trainer`` for models with large memories.

    Memories of 16,384 cells or more, unless their config says otherwise, and those whose config demands it have sparse
    gradients while it trains, which are clipped with the others, and :class:`sparsepeft.training.LazyAdamW` takes the
    place of AdamW. Without such a memory, and with an optimizer of one's own, it is the trainer that it is built on.

    Args:
        *args, **kwargs: of ``transformers.Trainer``.

    Raises:
        UserError: sparse gradients are demanded with several processes, or with another optimizer than AdamW.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decided: list[tuple[SparseMemory, bool | None]] = []
        self._lazy_adamw: tuple[type[LazyAdamW], dict[str, Any]] | None = None  # where it can take AdamW's place
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return
        model: Any = self.model
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        is_possible = isinstance(optimizer_class, type) and issubclass(optimizer_class, AdamW)
        memories = _trained_memories(model)
        undecided = [memory for memory in memories if memory.sparse_gradients is None]
        try:
            if is_possible and memories:
                self._lazy_adamw = LazyAdamW, settings
            if use_sparse_gradients(model, self.args.world_size == 1 and is_possible):
                self.optimizer_cls_and_kwargs = self._lazy_adamw
            self._decided = [(memory, memory.sparse_gradients) for memory in undecided]
        finally:
            _leave_open(undecided)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers has it; then memories leave open again what their config does, for other optimizers.

        From a checkpoint with the moments of some rows alone LazyAdamW goes on, be gradients sparse or dense now.
        """
        checkpoint = (
            get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        if self._lazy_adamw is not None and checkpoint and holds_rows(Path(checkpoint) / OPTIMIZER_NAME):
            self.optimizer_cls_and_kwargs = self._lazy_adamw
        open_now = [(memory, is_sparse) for memory, is_sparse in self._decided if memory.sparse_gradients is None]
        for memory, is_sparse in open_now:
            memory.sparse_gradients = is_sparse
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            _leave_open([memory for memory, _ in open_now])

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if has_sparse_gradients(model.parameters()):
            return self._clip_sparse(model, self.args.max_grad_norm)
        norm: Tensor = super()._clip_grad_norm(model)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and has_sparse_gradients(model.parameters()):
            grad_norm = self._clip_sparse(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _clip_sparse(self, model: nn.Module, max_norm: float) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_grad_norm(model.parameters(), max_norm)


def use_sparse_gradients(model: nn.Module, is_possible: bool = True) -> bool:
    """Decide on the gradients of memories that leave it open: sparse from 16,384 cells on.

    Args:
        model: whose memories it is about.
        is_possible: there is one process, and an optimizer that takes sparse gradients.

    Returns:
        Whether one that is trained has sparse gradients.

    Raises:
        UserError: it is not possible, but a memory's config demands it.
    """
    memories = _trained_memories(model)
    for memory in memories:
        if memory.sparse_gradients is None:
            num_parents, num_children, _ = memory.child_keys.shape
            memory.sparse_gradients = is_possible and num_parents * num_children >= _MANY_CELLS
        elif memory.sparse_gradients and not is_possible:
            raise UserError(
                "`sparse_gradients=True` was given with several processes, or with another optimizer than AdamW, which "
                "do not take them; leave it out."
            )
    return any(memory.sparse_gradients for memory in memories)


def _trained_memories(model: nn.Module) -> list[SparseMemory]:
    return [
        module for module in model.modules() if isinstance(module, SparseMemory) and module.child_keys.requires_grad
    ]


def _leave_open(memories: Iterable[SparseMemory]) -> None:
    for memory in memories:
        memory.sparse_gradients = None


def has_sparse_gradients(parameters: Iterable[Tensor]) -> bool:
    """Whether a gradient is a sparse tensor."""
    return any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients of which some are sparse tensors.

    Returns:
        The norm of all gradients together, before they were clipped.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)  # a row that occurs twice counts by the sum
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = nn.utils.get_total_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return norm
