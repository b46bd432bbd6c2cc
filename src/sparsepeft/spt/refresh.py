"""New codebooks, now and then, between optimizer steps."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsepeft.spt.attention import SparseAttention

_STEPS = "sparsepeft_steps"  # in an optimizer's parameter groups


class CodebookRefresh:
    """After every ``interval`` steps of whatever optimizer trains a model, lets codebooks follow queries and keys.

    The pass after such a step computes new codebooks, and the next step puts them into use: never within a step, in
    which gradient checkpointing may run layers twice. No callback of a trainer is needed. It acts as long as it lives.

    Steps are counted in the optimizer's parameter groups, which are saved with its state: a training that is resumed
    with that state goes on as if it had not been interrupted.

    Args:
        model: the sparse model.
        layers: its sparse attention.
        interval: steps between two refreshes.
    """

    def __init__(self, model: nn.Module, layers: list[SparseAttention], interval: int) -> None:
        self.interval = interval
        self._model, self._layers = ref(model), layers
        self._trains: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        _alive.add(self)
        _watch_optimizers()

    def __reduce__(self) -> tuple[type[CodebookRefresh], tuple[Any, ...]]:
        return CodebookRefresh, (self._model(), self._layers, self.interval)  # a copied model has one of its own

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
        before = optimizer.param_groups[0].get(_STEPS, 0)
        for group in optimizer.param_groups:
            group[_STEPS] = before + 1
        for layer in self._layers:
            codebooks = layer.state.current
            codebooks.step(is_due=before > 0 and before % self.interval == 0)
            codebooks.expected = (before + 1) % self.interval == 0


_alive: WeakSet[CodebookRefresh] = WeakSet()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for each in list(_alive):
        each.after_step(optimizer)


@cache
def _watch_optimizers() -> None:
    """Once, and not before there is something to refresh."""
    register_optimizer_step_post_hook(_after_any_step)
