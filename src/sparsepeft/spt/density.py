"""Where and when a sparse model computes as the dense one: first steps, positions with labels, answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from sparsepeft.arguments import check_choice
from sparsepeft.models.auxiliary_loss import by_name, resume_in_backward, shifts_labels
from sparsepeft.models.context import ForwardContext
from sparsepeft.spt.config import INFER, SptConfig

logger = logging.get_logger(__name__)


class SparseContext(ForwardContext):
    """State that the layers of one sparse model share.

    Args:
        config: of the model.

    Attributes:
        infer: how the model answers in eval mode, ``"sparse"`` or ``"dense"``.
        steps: where the optimizer's steps are counted, a module with ``current.steps``; None if the start of training
            is sparse.
    """

    def __init__(self, config: SptConfig) -> None:
        super().__init__()
        self.infer = config.infer
        self.steps: Any = None
        self._dense_steps, self._dense_labels = config.dense_steps, config.dense_labels
        # Of the running pass; after it of the latest with gradients, whose layers gradient checkpointing runs again.
        self._positions: Tensor | None = None
        self._kept: Tensor | None = None  # while a pass runs, what was in its place before
        self._told: Tensor | None = None  # by `labelled`
        self._is_encoder_decoder = self._shifts_labels = False
        self._handles: list[RemovableHandle] = []

    def is_dense(self, training: bool) -> bool:
        """Whether all of a layer is dense now, for the mode that the layer is in."""
        if not training:
            return self.infer == "dense"
        return self.steps is not None and int(self.steps.current.steps) < self._dense_steps

    def count_step(self, before: int) -> None:
        """Note that an optimizer step was done after ``before`` others.

        An adapter that is trained on with a new optimizer, which begins to count anew, keeps the steps that it has had.
        """
        if self.steps is not None:
            self.steps.current.steps.clamp_(min=before + 1)

    def watch(self, model: nn.Module) -> None:
        """From now on note what ``model`` is called with: masks, and positions with labels."""
        self.losses.watch(model)
        self._is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._shifts_labels = shifts_labels(model)
        if self._dense_labels:
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, always_call=True),
            ]

    def unwatch(self) -> None:
        """Undo :meth:`watch`."""
        self.losses.unwatch()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def told(self, labels: Tensor) -> Iterator[None]:
        """Inside the context, labels are these, and not those that reach the model."""
        if self._dense_labels:
            positions = self._with_labels(labels, self._shifts_labels)
            if positions is None:
                raise ValueError(
                    f"labelled got labels {labels!r:.80}; expected whole numbers (B, T), a label of each position."
                )
            self._told = positions
        try:
            yield
        finally:
            self._told = None

    def positions_for(self, states: Tensor, is_decoder: bool) -> Tensor | None:
        """Which positions of states (B, T, D) or (B T, D) stay dense in training, (B, T) or (B T,) of bool, if any do.

        Args:
            states: of the layer's input.
            is_decoder: of an encoder and a decoder, whether the layer is one of the latter.
        """
        positions = self._positions
        if positions is None or (self._is_encoder_decoder and not is_decoder):
            return None
        if states.dim() == 2:  # some layers flatten their batch
            positions = positions.reshape(-1)
        return positions.to(states.device) if positions.shape == states.shape[:-1] else None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        self._kept, self._positions = self._positions, self._told
        if self._told is None:
            named = by_name(model, args, kwargs)
            shifted = named.get("shift_labels")
            self._positions = (
                self._with_labels(named.get("labels"), self._shifts_labels)
                if shifted is None
                else self._with_labels(shifted, False)
            )
        if self._positions is None and torch.is_grad_enabled():
            logger.warning_once(
                "dense_labels=True has no effect here: the model was called without labels of positions. A loss "
                "of single texts has none; for one computed outside the model use sparsepeft.spt.labelled."
            )

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        # A pass without gradients may come between another one's forward and its checkpointed layers' second forward.
        if model.training and not torch.is_grad_enabled():
            self._positions = self._kept
        elif model.training and output is not None:
            resume_in_backward(model, output, partial(self._resume, self._positions))

    def _resume(self, positions: Tensor | None) -> None:
        self._positions = positions

    @staticmethod
    def _with_labels(labels: Any, shifts: bool) -> Tensor | None:
        """The positions whose outputs are compared with labels, (B, T) of bool; None where labels are of whole texts.

        Args:
            labels: the model's argument.
            shifts: whether each is compared with the output before it.
        """
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():  # several of each text
            return None
        counts = labels.ne(-100)
        return torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1) if shifts else counts


@contextmanager
def answering(model: nn.Module, infer: str) -> Iterator[None]:
    """Inside the context a sparse model answers, in eval mode, as itself or as the dense model it was made from.

    Its adapters act either way. ``SptConfig(infer=...)`` says how it answers elsewhere.

    Args:
        model: a sparse model, with or without an adapter.
        infer: ``"sparse"`` or ``"dense"``.

    Raises:
        ValueError: the model is not sparse, or ``infer`` is something else.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft.spt import SptConfig, answering, sparsify
        >>> model, ids = AutoModelForCausalLM.from_pretrained("MODEL"), torch.randint(5, 90, (2, 32))
        >>> dense = model(ids).logits
        >>> model = sparsify(model, SptConfig(top_l=8, num_blocks=4), calibration_data=ids)
        >>> with answering(model, "dense"):
        ...     bool(torch.allclose(model(ids).logits, dense, atol=1e-3))
        True
    """
    check_choice("infer", infer, INFER)
    context = _context_of(model)
    if context is None:
        raise ValueError(
            f"answering got a dense {type(model).__name__}, which has one way to answer; call it as it is."
        )
    before, context.infer = context.infer, infer
    try:
        yield
    finally:
        context.infer = before


@contextmanager
def labelled(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Inside the context a sparse model takes these labels for those of its batch, to keep their positions dense.

    For losses that are computed outside the model, which then does not see the labels that ``dense_labels`` asks for.
    Any other model, and one without ``dense_labels``, is left as it is. The backward pass may be outside.

    Args:
        model: called inside, once or more, in training mode.
        labels: (B, T) as the model would take them, -100 where nothing is learnt: those of a causal language model
            are the tokens themselves, not shifted.

    Raises:
        ValueError: ``labels`` is no such tensor.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft.spt import SptConfig, labelled, sparsify
        >>> model, ids = AutoModelForCausalLM.from_pretrained("MODEL"), torch.randint(5, 90, (2, 32))
        >>> model = sparsify(model, SptConfig(top_l=8, num_blocks=4, dense_labels=True), calibration_data=ids)
        >>> labels = ids.clone()
        >>> labels[:, :24] = -100  # the context
        >>> with labelled(model.train(), labels):
        ...     logits = model(ids).logits
        >>> loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    """
    context = _context_of(model)
    with nullcontext() if context is None else context.told(labels):
        yield


def _context_of(model: nn.Module) -> SparseContext | None:
    """What the layers of a sparse model share, whatever wraps the model; None if it is dense."""
    contexts = (getattr(module, "context", None) for module in model.modules())
    return next((context for context in contexts if isinstance(context, SparseContext)), None)
