"""New codebooks, now and then, between optimizer steps."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsepeft.spt.attention import SparseAttention


class CodebookRefresh:
    """After every ``interval`` steps of whatever optimizer trains a model, lets codebooks follow queries and keys.

    The pass after such a step computes new codebooks, and the next step puts them into use: never within a step, in
    which gradient checkpointing may run layers twice. No callback of a trainer is needed. It acts as long as it lives.

    Args:
        model: the sparse model.
        layers: its sparse attention.
        interval: steps between two refreshes.
    """

    def __init__(self, model: nn.Module, layers: list[SparseAttention], interval: int) -> None:
        self.interval, self.steps = interval, 0
        self._model, self._layers = ref(model), layers
        self._trains: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        _alive.add(self)
        _watch_optimizers()

    def resume(self, steps: int) -> None:
        """Go on after ``steps`` steps of an interrupted training, whose codebooks were loaded already."""
        self.steps = steps
        for layer in self._layers:
            layer.state.current.due = steps % self.interval == 0

    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step, if it was one of the model's."""
        model = self._model()
        if model is None:
            return
        if optimizer not in self._trains:
            own = {id(parameter) for parameter in model.parameters()}
            self._trains[optimizer] = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        if not self._trains[optimizer]:
            return
        self.steps += 1
        for layer in self._layers:
            codebooks = layer.state.current
            codebooks.step()
            codebooks.due = codebooks.due or self.steps % self.interval == 0


_alive: WeakSet[CodebookRefresh] = WeakSet()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for each in list(_alive):
        each.after_step(optimizer)


@cache
def _watch_optimizers() -> None:
    """Once, and not before there is something to refresh."""
    register_optimizer_step_post_hook(_after_any_step)
