"""What the layers of one adapted model share during a forward pass."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsepeft.models.loss_scale import LossScale

if TYPE_CHECKING:
    from sparsepeft.models.heads import LabelState

BASE = "__base__"  # PEFT's name for "no adapter" in `adapter_names`

# Its replicas would share the hooks, and with them the parameters, of the model on the first device.
DATA_PARALLEL_REFUSED = (
    "nn.DataParallel cannot replicate a model with this adapter; start one process for each GPU, with `accelerate "
    "launch` or `torchrun` (DistributedDataParallel), or let the program see one GPU (CUDA_VISIBLE_DEVICES=0)."
)


class Routing:
    """Which adapter each row of a mixed batch uses.

    Args:
        adapter_names: one for each input; :data:`BASE` for the bare backbone.
    """

    def __init__(self, adapter_names: list[str]) -> None:
        self.adapter_names = adapter_names
        self._rows: dict[int, dict[str, list[int]]] = {}

    def rows(self, batch_size: int, device: torch.device) -> dict[str, slice | torch.Tensor]:
        """Row indices of each adapter in a batch of ``batch_size`` (beams repeat each row in place).

        Rows that follow each other are a slice, which costs no copy.
        """
        names = self.adapter_names
        if not names or batch_size % len(names):
            raise ValueError(
                f"adapter_names has {len(names)} entries for a batch of {batch_size}; pass one adapter name per input."
            )
        if batch_size not in self._rows:
            repeats = batch_size // len(names)
            groups: dict[str, list[int]] = {}
            for row in range(batch_size):
                groups.setdefault(names[row // repeats], []).append(row)
            self._rows[batch_size] = groups
        return {
            name: slice(rows[0], rows[-1] + 1)
            if rows[-1] - rows[0] + 1 == len(rows)
            else torch.tensor(rows, device=device)
            for name, rows in self._rows[batch_size].items()
        }


class _Call(threading.local):
    """What belongs to the forward pass that runs in this thread, so that passes in several threads do not meet."""

    def __init__(self) -> None:  # called in each thread that asks; torch.compile needs attributes of the instance
        self.routing: Routing | None = None
        self.head_input: torch.Tensor | None = None
        self.last_norm: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return _Call, ()  # a copied or pickled model takes no running pass with it


class ForwardContext:
    """State that the layers and heads of one adapted model share.

    Attributes:
        disabled: adapters are switched off; one switch for layers and heads, since transformers' own
            ``enable_adapters`` reaches the layers alone.
        injected: the layers stand in a bare transformers model (its ``load_adapter``) and not in a ``PeftModel``.
        configs: the config of each adapter.
        labels: keeps the model's config at the active adapter's labels; None without a head.
        call: of the pass that runs in the current thread: ``routing``, which adapter each row uses, in a mixed batch;
            ``head_input``, what the model hands to the first module of its head (a small head reads it);
            ``last_norm``, a layer's latest norm with its input and output (see ``BottleneckLayer``).
        attention_mask, decoder_attention_mask: (B, T) of the latest pass; kept after it, because gradient
            checkpointing runs the layers again in backward.
        loss_scale: of the latest pass with gradients; what auxiliary losses follow.
    """

    def __init__(self) -> None:
        self.disabled = False
        self.injected = False
        self.configs: dict[str, Any] = {}
        self.labels: LabelState | None = None
        self.call = _Call()
        self.attention_mask: torch.Tensor | None = None
        self.decoder_attention_mask: torch.Tensor | None = None
        self.loss_scale = LossScale()
        self._handles: list[Any] = []

    def set_enabled(self, enabled: bool) -> None:
        """Switch the adapters, and the labels in the model's config, on or off."""
        self.disabled = not enabled
        if self.labels is not None:
            self.labels.enable(enabled)

    @contextmanager
    def routed(self, adapter_names: list[str]) -> Iterator[None]:
        """Within, forward passes of this thread use these adapters, one for each row."""
        self.call.routing = Routing(adapter_names)
        try:
            yield
        finally:
            self.call.routing = None

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

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # A pass without gradients may come between another one's forward and its checkpointed layers' second forward.
        if not torch.is_grad_enabled():
            return None
        named = _by_name(model, args, kwargs)
        self.attention_mask = named.get("attention_mask")
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.decoder_attention_mask = _decoder_mask(model, named) if is_encoder_decoder else self.attention_mask
        self.loss_scale = LossScale()
        return args, self.loss_scale.mark(kwargs)

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.loss_scale.watch(model, _by_name(model, args, kwargs), output)


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
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


def attach_loss(hidden_states: torch.Tensor, loss: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """``hidden_states`` unchanged, with ``loss`` added to whatever is differentiated through them.

    An auxiliary loss collected in a list would be lost under reentrant gradient checkpointing, whose forward pass
    runs without gradients; attached to the states it is part of the graph whenever the layer is (as in Megatron's
    MoEAuxLossAutoScaler, which is told the scale that :class:`LossScale` reads).
    """
    attached: torch.Tensor = _AttachLoss.apply(hidden_states, loss, context.loss_scale)
    return attached
