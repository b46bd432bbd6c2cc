"""Running the lower layers once for several tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsepeft.tuners._blocks import find_blocks


class _Reached(Exception):
    """Ends a pass that was only to reach a layer."""


class _Plan(threading.local):
    """What the pass in this thread does with the lower layers."""

    stop_after: int | None = None  # keep this layer's output, and end
    start_after: int | None = None  # do not compute up to this layer, whose output is ``output``
    output: Any = None


class FanOut:
    """Lets passes of a model end after a layer, or begin after one with states that are there already.

    It takes the place of each layer's ``forward``, and not of the layer, so names and hooks stay as they are.

    Args:
        model: with one stack of layers; with another (an encoder-decoder) nothing can be shared.

    Attributes:
        num_layers: layers that could be shared, 0 if none.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = find_blocks(model)
        one_stack = len({block.name.rpartition(".")[0] for block in blocks}) == 1
        self.num_layers = len(blocks) if one_stack and all(block.batch_dim == 0 for block in blocks) else 0
        self._plan = _Plan()
        for block in blocks[: self.num_layers]:
            layer: Any = block.module
            layer.forward = partial(self._forward, block.index, layer.forward)

    @contextmanager
    def ending_after(self, layer: int) -> Iterator[None]:
        """Within, the pass of this thread ends after ``layer``; :meth:`states` then has its output."""
        self._plan.stop_after = layer
        try:
            yield
        except _Reached:
            pass
        finally:
            self._plan.stop_after = None

    def states(self) -> torch.Tensor | None:
        """The states (B, T, D) of the pass that has ended; None if its layers hand on more than that."""
        output, self._plan.output = self._plan.output, None
        return output if isinstance(output, torch.Tensor) else None

    @contextmanager
    def beginning_after(self, layer: int, states: torch.Tensor) -> Iterator[None]:
        """Within, the pass of this thread takes ``states`` (B, T, D) for the output of ``layer``."""
        self._plan.start_after, self._plan.output = layer, states
        try:
            yield
        finally:
            self._plan.start_after = self._plan.output = None

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        if plan.start_after is not None and index <= plan.start_after:
            if index == plan.start_after:
                return plan.output
            return args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        if plan.stop_after == index:
            plan.output = output
            raise _Reached
        return output
