"""Counting the optimizer's steps, for what changes while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_STEPS = "sparsepeft_steps"  # in an optimizer's parameter groups


class OptimizerSteps:
    """Calls listeners after every step of the optimizer that trains a model, as long as it lives.

    No callback of a trainer is needed. Steps are counted in the optimizer's parameter groups, which are saved with its
    state: a training that is resumed with that state goes on as if it had not been interrupted.

    Args:
        model: any.
        listeners: each is told how many steps were done before this one.
    """

    def __init__(self, model: nn.Module, listeners: list[Callable[[int], None]]) -> None:
        self._model, self._listeners = ref(model), listeners
        self._trains: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        _alive.add(self)
        _watch_optimizers()

    def __reduce__(self) -> tuple[type[OptimizerSteps], tuple[Any, ...]]:
        return OptimizerSteps, (self._model(), self._listeners)  # a copied model gets its own

    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step, if it was one of the model's."""
        model = self._model()
        if model is None:
            return
        if optimizer not in self._trains:
            trained = {id(parameter) for parameter in model.parameters()}
            self._trains[optimizer] = any(id(p) in trained for group in optimizer.param_groups for p in group["params"])
        if not self._trains[optimizer]:
            return
        before = optimizer.param_groups[0].get(_STEPS, 0)
        for group in optimizer.param_groups:
            group[_STEPS] = before + 1
        for listener in self._listeners:
            listener(before)


_alive: WeakSet[OptimizerSteps] = WeakSet()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for each in list(_alive):
        each.after_step(optimizer)


@cache
def _watch_optimizers() -> None:
    """Once, and not before there is something to count for."""
    register_optimizer_step_post_hook(_after_any_step)
