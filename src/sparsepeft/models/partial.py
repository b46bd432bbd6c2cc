"""Passes of a model that end after a layer, or begin after one with states that are there already."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsepeft.models.blocks import find_blocks


class _StopForward(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


class _Plan(threading.local):
    """What the pass in this thread does with the lower layers."""

    def __init__(self) -> None:
        self.end_after: int | None = None
        self.begin_after: int | None = None
        self.output: Any = None  # of the one layer or the other


class PartialPasses:
    """Replaces each layer's ``forward`` (not the layer itself, so names and hooks stay as they are).

    Each thread has its own plan. A layer that runs several times (ALBERT's) counts as one.

    Args:
        model: with one stack of layers; with another (an encoder-decoder) no pass can be partial.

    Attributes:
        num_layers: layers that can be left out, 0 if none.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = find_blocks(model)
        one_stack = len({block.name.rpartition(".")[0] for block in blocks}) == 1
        self.num_layers = len(blocks) if one_stack and all(block.batch_dim == 0 for block in blocks) else 0
        self._layers: list[Any] = [block.module for block in blocks[: self.num_layers]]
        self._plan = _Plan()
        # Accelerate's hooks (offloading, several devices) stand in the instance, too, and are wrapped here.
        self._originals = [vars(layer).get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._forward, index, layer.forward)

    def remove(self) -> None:
        """Restore the layers' own ``forward``."""
        for layer, original in zip(self._layers, self._originals, strict=True):
            if original is None:
                del layer.forward
            else:
                layer.forward = original
        self._layers, self._originals, self.num_layers = [], [], 0

    @contextmanager
    def ending_after(self, layer: int) -> Iterator[None]:
        """Inside the context, this thread's pass ends after ``layer``; :meth:`states` then has its output."""
        self._plan.end_after = layer
        try:
            yield
        except _StopForward:
            pass
        finally:
            self._plan.end_after = None

    def states(self) -> torch.Tensor | None:
        """The states (B, T, D) that the last pass ended with; None if its layers hand on more than that."""
        output, self._plan.output = self._plan.output, None
        return output if isinstance(output, torch.Tensor) else None

    @contextmanager
    def beginning_after(self, layer: int, states: torch.Tensor) -> Iterator[None]:
        """Inside the context, this thread's passes begin after ``layer``, with ``states`` (B, T, D) as its output."""
        self._plan.begin_after, self._plan.output = layer, states
        try:
            yield
        finally:
            self._plan.begin_after = self._plan.output = None

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        if plan.begin_after is not None and index <= plan.begin_after:
            if index == plan.begin_after:
                return plan.output
            return args[0] if args else kwargs["hidden_states"]
        if plan.end_after is None:
            return forward(*args, **kwargs)
        if index > plan.end_after:
            raise _StopForward
        output = forward(*args, **kwargs)
        if index == plan.end_after:
            plan.output = output
        return output
