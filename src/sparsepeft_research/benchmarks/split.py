"""Where the time of a training step goes: forward and backward of named parts of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Span(NamedTuple):
    """A part of a model: from what goes into one module to what comes out of another (or the same)."""

    first: nn.Module
    last: nn.Module


@contextmanager
def measuring(parts: Mapping[str, Sequence[Span]], device: str = "cpu") -> Iterator[dict[str, float]]:
    """While this lasts, add up the milliseconds that parts take, forward and backward.

    Modules' own backward hooks do not see inputs that are passed by keyword, so inputs and outputs go through an
    identity whose backward notes the time. What enters a part must require gradients, or its backward has no end. On a
    GPU every boundary waits for it: the sum is then more than an undisturbed step takes.

    Args:
        parts: by name.
        device: "cpu" or "cuda".
    """
    spent = dict.fromkeys(parts, 0.0)
    handles = []
    for name, spans in parts.items():
        for span in spans:
            watch = _Stopwatch(spent, name, device)
            handles.append(span.first.register_forward_pre_hook(watch.enter, with_kwargs=True))
            handles.append(span.last.register_forward_hook(watch.leave))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


class _Stopwatch:
    """Adds what one span takes to the total of its part."""

    def __init__(self, spent: dict[str, float], name: str, device: str) -> None:
        self.spent, self.name, self.device = spent, name, device
        self.started = 0.0

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.start()
        if args:
            return (_Noted.apply(args[0], self.stop), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _Noted.apply(kwargs["hidden_states"], self.stop)}

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.stop()
        if isinstance(output, tuple):
            return (_Noted.apply(output[0], self.start), *output[1:])
        return _Noted.apply(output, self.start)

    def start(self) -> None:
        self.started = self._now()

    def stop(self) -> None:
        self.spent[self.name] += 1e3 * (self._now() - self.started)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _Noted(torch.autograd.Function):
    """Identity that calls ``note()`` in backward."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return gradients[0], None
