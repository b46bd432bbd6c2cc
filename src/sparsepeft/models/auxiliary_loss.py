"""Auxiliary losses (load balancing) of layers inside a model that somebody else calls and trains.

They need to know which positions of a batch are padding, and how strongly the main loss of the pass counts.

An auxiliary loss has to keep to the main one in each of several accumulated passes, but nothing says how strong that
is. It may be a mean over the pass, which Trainer divides by the number of passes, or a sum divided by the number of
items in all passes (``num_items_in_batch``). It may be computed in the model or, with ``label_smoothing_factor`` or
``compute_loss_func``, outside it. Mixed precision and several processes scale it besides. So the weight is read off in
backward, from the gradient that arrives at the model's loss or, where the model computes none, at its logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsepeft.models.logits import DeferredLogits
from sparsepeft.models.nested import tensors_in

_CHUNK = 2**24  # values of the logits that are looked at together: 64 MB each in float32


class LossScale:
    """What the gradient of one forward pass says about the weight of its loss.

    Attributes:
        value: the weight, a scalar; None before backward, and where neither loss nor logits get a gradient.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._weights: dict[str, torch.Tensor] = {}

    def mark(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's keyword arguments, with ``num_items_in_batch`` such that it shows whether the loss uses it."""
        total = kwargs.get("num_items_in_batch")
        if total is None:
            return kwargs
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            total = torch.as_tensor(total, dtype=torch.float32).detach().requires_grad_()
        self._total = total
        return kwargs | {"num_items_in_batch": total}

    def watch(self, model: nn.Module, named: dict[str, Any], output: Any) -> None:
        """Read the weight when the gradient arrives at what ``model`` returned for the arguments ``named``."""
        values = output if isinstance(output, dict) else {}
        loss = values.get("loss")
        if loss is None and isinstance(output, tuple) and named.get("labels") is not None:
            loss = output[0]
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.register_hook(partial(self._from_loss, self._share(model, named, loss)))
            return
        for name, value in values.items():
            if isinstance(value, DeferredLogits):  # a loss outside would pass by the logits that are watched
                values[name] = value = value.compute()
            if name.endswith("logits") and isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(partial(self._from_logits, name, value.detach()))

    def _share(self, model: nn.Module, named: dict[str, Any], loss: torch.Tensor) -> torch.Tensor | float:
        """Which part of the items the loss was divided by are this pass's own; 1 for a mean over the pass."""
        labels = named.get("labels") if named.get("shift_labels") is None else named["shift_labels"]
        if self._total is None or not isinstance(labels, torch.Tensor):
            return 1.0
        # Not every loss uses num_items_in_batch, though nearly every model accepts it.
        (used,) = torch.autograd.grad(loss, self._total, retain_graph=True, allow_unused=True)
        if used is None:
            return 1.0
        if named.get("shift_labels") is None and shifts_labels(model):
            labels = labels[..., 1:]
        return labels.ne(-100).sum().to(loss.device) / self._total.detach().to(loss.device)

    def _from_loss(self, share: torch.Tensor | float, gradient: torch.Tensor) -> None:
        self.value = gradient.detach() * share

    def _from_logits(self, name: str, logits: torch.Tensor, gradient: torch.Tensor) -> None:
        weight = cross_entropy_weight(logits, gradient)
        if weight is not None:
            self._weights[name] = weight  # question answering has two
            self.value = torch.stack(list(self._weights.values())).sum()


@torch.no_grad()
def cross_entropy_weight(logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """The sum of the weights w_i with which cross entropies of positions i make up a loss, from its gradient.

    ``d loss / d logits_i = w_i (p_i - q_i)`` with probabilities p and target q. Where q is 0, which is everywhere but
    at the label, the gradient is w p and positive, so ``w = sum of positive gradients / sum of p there``. Exact for
    hard labels, and somewhat less than w with label smoothing; whatever the loss, it is in proportion to its scale.

    Args:
        logits, gradient: (..., V).

    Returns:
        A scalar in float32; None for a single logit, from which no weight can be told.
    """
    width = logits.shape[-1]
    if width < 2:
        return None
    rows = max(1, _CHUNK // width)
    total = torch.zeros((), device=logits.device)
    for x, g in zip(logits.reshape(-1, width).split(rows), gradient.reshape(-1, width).split(rows), strict=True):
        positive = g.float().clamp(min=0)
        probability = (x.float().softmax(-1) * (positive > 0)).sum(-1)
        total = total + (positive.sum(-1) / probability).nan_to_num(0.0, posinf=0.0).sum()
    return total


def shifts_labels(model: nn.Module) -> bool:
    """Whether labels predict the next position, so that the first of each row is no item; as Trainer counts them."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
    if loss is None:  # of GPT2LMHeadModel and its like, from whose names transformers reads none
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return loss is ForCausalLMLoss


class AuxiliaryLosses:
    """Adds losses inside a model's layers to whatever loss its caller differentiates, at that loss's own scale.

    Attributes:
        attention_mask, decoder_attention_mask: (B, T) of the latest pass with gradients; kept after it, because
            gradient checkpointing runs the layers again in backward, see :func:`resume_in_backward`.
        scale: of the same pass.
    """

    def __init__(self) -> None:
        self.attention_mask: torch.Tensor | None = None
        self.decoder_attention_mask: torch.Tensor | None = None
        self.scale = LossScale()
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """From now on note the masks that ``model`` is called with and how strongly its loss counts."""
        if self._handles:
            return
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def unwatch(self) -> None:
        """Undo :meth:`watch`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def mask_for(self, hidden_states: torch.Tensor, is_decoder: bool) -> torch.Tensor | None:
        """The mask of states (B, T, D) or (B T, D): 1 where a position counts; None where all do or none fits."""
        mask = self.decoder_attention_mask if is_decoder else self.attention_mask
        if mask is None or mask.dim() != 2:
            return None
        if hidden_states.dim() == 2:  # some layers flatten their batch
            mask = mask.reshape(-1)
        return mask if mask.shape == hidden_states.shape[:-1] else None

    @torch.compiler.disable  # it would take the scale, which backward brings, for a constant
    def attach(self, hidden_states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """``hidden_states`` unchanged, with the scalar ``loss`` added to whatever is differentiated through them.

        An auxiliary loss collected in a list would be lost under reentrant gradient checkpointing, whose forward pass
        runs without gradients; attached to the states it is part of the graph whenever the layer is (as in Megatron's
        MoEAuxLossAutoScaler, which is told the scale that :class:`LossScale` reads).
        """
        attached: torch.Tensor = _AttachLoss.apply(hidden_states, loss, self.scale)
        return attached

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # A pass without gradients may come between another one's forward and its checkpointed layers' second forward.
        if not torch.is_grad_enabled():
            return None
        named = by_name(model, args, kwargs)
        self.attention_mask = named.get("attention_mask")
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.decoder_attention_mask = _decoder_mask(model, named) if is_encoder_decoder else self.attention_mask
        self.scale = LossScale()
        return args, self.scale.mark(kwargs)

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.scale.watch(model, by_name(model, args, kwargs), output)
            state = (self.attention_mask, self.decoder_attention_mask, self.scale)
            resume_in_backward(model, output, partial(self._resume, state))

    def _resume(self, state: tuple[torch.Tensor | None, torch.Tensor | None, LossScale]) -> None:
        self.attention_mask, self.decoder_attention_mask, self.scale = state


def resume_in_backward(model: nn.Module, output: Any, resume: Callable[[], None]) -> None:
    """Call ``resume`` in backward before gradient checkpointing runs the layers of this pass again.

    A loss may join several passes, as a contrastive one does. The latest is differentiated first, and whole, because
    autograd goes by the order in which operators were called; so an earlier one begins where a gradient arrives at its
    output, and what was noted for its layers has to be in place again.
    """
    if torch.compiler.is_compiling() or not getattr(model, "is_gradient_checkpointing", False):
        return
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: resume())


def by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.get("kwargs", {}), **bound}


def _decoder_mask(model: Any, named: dict[str, Any]) -> torch.Tensor | None:
    """Which positions of a decoder count, where the caller leaves it to transformers to derive its inputs.

    A position that a label is learnt at counts; without labels one whose input is no padding (the first may start with
    the padding token). BART's classifiers derive the decoder's inputs from the encoder's, which has its mask.
    """
    mask, labels, ids = (named.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if mask is not None:
        return mask
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        return labels.ne(-100)
    if ids is None:
        return named.get("attention_mask")
    if model.config.pad_token_id is None:
        return None
    counts = ids.ne(model.config.pad_token_id)
    counts[:, 0] = True
    return counts


class _AttachLoss(torch.autograd.Function):
    """Identity on ``hidden_states`` that sends the value of ``scale`` as gradient to ``loss`` in backward."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, loss: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (loss,) = ctx.saved_tensors
        one = torch.ones_like(loss)
        return gradients[0], one if ctx.scale.value is None else one * ctx.scale.value.to(loss), None
