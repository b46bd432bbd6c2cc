"""What the layers and heads of one adapted model share: which adapters act, for which rows, with which labels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsepeft.models.auxiliary_loss import AuxiliaryLosses
from sparsepeft.models.labels import LabelState

BASE = "__base__"  # PEFT's name for "no adapter" in `adapter_names`

# Its replicas would share the hooks, and with them the parameters, of the model on the first device.
DATA_PARALLEL_REFUSED = (
    "nn.DataParallel cannot replicate a model with adapters or sparse layers of sparsepeft; start one process for each "
    "GPU, with `accelerate launch` or `torchrun` (DistributedDataParallel), or let the program see one GPU "
    "(CUDA_VISIBLE_DEVICES=0)."
)


def computed_once(what: str) -> ValueError:
    """The error for a module that mixed adapters would change and that does not know the rows of a batch."""
    return ValueError(
        f"{what} computes once for all rows of a batch, or has them in another order, so that it cannot be another "
        "adapter's in each row; answer the rows of each adapter in a batch of their own, with set_adapter."
    )


class Routing:
    """Which adapter each row of a mixed batch uses.

    Args:
        adapter_names: one for each input; :data:`BASE` for the bare backbone.
        even: whether each input brings as many images (sounds, videos) as the others, in as many parts. A tower of a
            model of several kinds of input runs all of them as rows, or as one long row, in the inputs' order.
        guided: the model puts a second copy of all inputs behind them, for its guidance without the prompt.

    Attributes:
        is_mixed: whether there are several adapters.
    """

    def __init__(self, adapter_names: list[str], even: bool = True, guided: bool = False) -> None:
        self.adapter_names, self.even, self.guided = adapter_names, even, guided
        self.is_mixed = len(set(adapter_names)) > 1
        self._rows: dict[int, dict[str, list[int]]] = {}

    def rows(self, batch_size: int, device: torch.device, *, is_tower: bool = False) -> dict[str, slice | torch.Tensor]:
        """Row indices of each adapter in a batch of ``batch_size`` (beams, choices and parts repeat each row in place).

        Rows that follow each other are a slice, which costs no copy.

        Args:
            batch_size: rows in the states, a multiple of the inputs.
            device: of the states.
            is_tower: the states are of images (sounds, videos) that are later put between a text's.

        Raises:
            ValueError: no whole number of rows for each input, or not known which rows are whose.
        """
        names = self.adapter_names
        if is_tower and self.is_mixed and not self.even:
            raise ValueError(
                "adapter_names mixes adapters in a batch whose inputs do not all have the same number of image (sound, "
                "video) tokens, so that it is not known which of the tower's states are whose; pass such inputs in "
                "batches of one adapter each, or keep the adapters to the text's layers (target_modules)."
            )
        if not names or batch_size % len(names):
            raise ValueError(
                f"adapter_names has {len(names)} entries for a batch of {batch_size}; pass one adapter name per input."
            )
        if self.guided and self.is_mixed and batch_size > len(names):
            raise ValueError(
                "adapter_names mixes adapters in a batch that is generated with guidance_scale above 1, of which this "
                "model puts a second copy behind the first; generate with each adapter by itself, or with "
                "guidance_scale=1."
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


class CallState(threading.local):
    """What belongs to the forward pass that runs in this thread, so that passes in several threads do not meet.

    Attributes:
        routing: which adapter each row uses, in a mixed batch.
        head_input: what the model hands to the first module of its head (a small head reads it).
        last_norm: a layer's latest norm with its input and output (see ``BottleneckLayer``).
        layer_shape: of the states that the latest layer got (see ``BitFitLayer``).
    """

    def __init__(self) -> None:  # called in each thread that asks; torch.compile needs attributes of the instance
        self.routing: Routing | None = None
        self.head_input: Any = None
        self.last_norm: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None
        self.layer_shape: torch.Size | None = None

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return CallState, ()  # a copied or pickled model takes no running pass with it


class ForwardContext:
    """State that the layers and heads of one adapted model share.

    Attributes:
        disabled: adapters are switched off; one switch for layers and heads, since transformers' own
            ``enable_adapters`` reaches the layers alone.
        injected: the layers stand in a bare transformers model (its ``load_adapter``) and not in a ``PeftModel``.
        configs: the config of each adapter.
        labels: keeps the model's config at the active adapter's labels; None without a head.
        call: what belongs to the pass that runs in the current thread.
        losses: of the layers, added to the model's.
    """

    def __init__(self) -> None:
        self.disabled = False
        self.injected = False
        self.configs: dict[str, Any] = {}
        self.labels: LabelState | None = None
        self.call = CallState()
        self.losses = AuxiliaryLosses()

    def set_enabled(self, enabled: bool) -> None:
        """Switch the adapters, and the labels in the model's config, on or off."""
        self.disabled = not enabled
        if self.labels is not None:
            self.labels.enable(enabled)

    @contextmanager
    def routed(self, adapter_names: list[str], even: bool = True, guided: bool = False) -> Iterator[None]:
        """Inside the context, forward passes of this thread use these adapters, one for each row: see `Routing`."""
        before, self.call.routing = self.call.routing, Routing(adapter_names, even, guided)
        try:
            yield
        finally:
            self.call.routing = before
