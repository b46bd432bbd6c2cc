"""An optimizer that touches the cells that a batch has read, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from sparsepeft.ops.product_memory import step_of_rows
from sparsepeft.ops.product_memory.update import AdamStep, Rows

_GROWTH = 1.5  # of the room for moments
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Before their names in a saved state, where they are those of touched rows: torch's fused AdamW would take them for
# those of all rows, and write beyond their end.
_OF_ROWS = "rows_"


class LazyAdamW(AdamW):
    """AdamW for parameters whose gradients are sparse tensors, and as ever for all others.

    Of such a parameter only the rows in its gradient are touched: their moments and values are updated as AdamW does,
    with the decay of weights, and those of all other rows stay as they are, as in ``torch.optim.SparseAdam`` ("Lazy
    Adam"). The bias of the moments is corrected by the number of the parameter's steps, as there, not of the row's.
    Moments are kept for rows that have been touched, in the order in which they were first, so memory and checkpoints
    grow with these.

    Args:
        params, **kwargs: as of ``torch.optim.AdamW``, without ``amsgrad``; and ``step`` takes no closure.

    Raises:
        ValueError: ``amsgrad=True``.

    Example:
        >>> import torch
        >>> table = torch.nn.Embedding(1000, 8, sparse=True)
        >>> optimizer = LazyAdamW(table.parameters(), lr=0.01)
        >>> table(torch.tensor([3, 5])).sum().backward()
        >>> optimizer.step()
        >>> moments = optimizer.state[table.weight]
        >>> len(moments["exp_avg"]) < 1000
        True
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        if kwargs.get("amsgrad"):
            raise ValueError("amsgrad=True was given, which LazyAdamW does not support; leave it out.")
        super().__init__(params, **kwargs)
        self._begin()

    def _begin(self) -> None:
        self._slots: dict[Tensor, Tensor] = {}  # of each row among those with moments; -1 without
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._step_supports_amp_scaling = False  # a scaler then unscales, and leaves out steps, before they are begun
        # As hooks, since AdamW's own step, called from another one, would call all hooks twice.
        self.register_step_pre_hook(LazyAdamW._step_sparsely)
        self.register_step_post_hook(LazyAdamW._give_back)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on as a copy, of which torch makes neither hooks nor what is not in ``state``."""
        super().__setstate__(state)
        if "_slots" not in self.__dict__:
            self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The state, of touched rows alone. AdamW cannot go on from it where there are some; LazyAdamW can from its."""
        content = super().state_dict()
        return content | {"state": {index: _saved(state) for index, state in content["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, of this optimizer or of AdamW."""
        renamed = {
            index: {name.removeprefix(_OF_ROWS): value for name, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": renamed})
        self._slots.clear()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            state = state_dict["state"].get(index, {})
            if "rows" in state:  # which torch has made numbers of the parameter's dtype
                self.state[parameter]["rows"] = state["rows"].to(parameter.device)

    @torch.no_grad()
    def _step_sparsely(self, args: Any, kwargs: Any) -> None:
        """Update the parameters with sparse gradients, and put these aside: AdamW refuses them."""
        if any(map(callable, (*args, *kwargs.values()))):
            raise ValueError("step was given a closure, which LazyAdamW does not support; compute gradients before.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._aside.append((parameter, parameter.grad))
                    self._update(group, parameter, coalesced(parameter.grad))
                    parameter.grad = None
                elif parameter.grad is not None and "rows" in self.state.get(parameter, {}):
                    self._spread(parameter)

    def _give_back(self, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._aside:
            parameter.grad = gradient
        self._aside.clear()

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if "exp_avg" in state and "rows" not in state:  # gradients were dense so far
            state["rows"] = torch.arange(len(parameter), device=parameter.device)
        elif not state:
            state["step"] = torch.tensor(0.0)
            state["rows"] = torch.empty(0, dtype=torch.long, device=parameter.device)
            for name in _MOMENTS:
                state[name] = parameter.new_zeros((0, *parameter.shape[1:]))
        state["step"] += 1
        rows, values = gradient.indices()[0], gradient.values()
        slots = self._find_slots(parameter, state, rows)
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        rate = float(group["lr"])
        step_size, root = rate / (1 - beta1**step), (1 - beta2**step) ** 0.5
        touched = Rows(
            rows, slots, -values if group["maximize"] else values, parameter, state["exp_avg"], state["exp_avg_sq"]
        )
        step_of_rows(touched, AdamStep(1 - rate * group["weight_decay"], beta1, beta2, step_size, root, group["eps"]))

    def _spread(self, parameter: Tensor) -> None:
        """Give all rows moments, as AdamW has them, where a gradient is dense from now on."""
        state = self.state[parameter]
        rows = state.pop("rows")
        for name in _MOMENTS:
            moments = torch.zeros_like(parameter)
            moments[rows] = state[name][: len(rows)]
            state[name] = moments
        self._slots.pop(parameter, None)

    def _find_slots(self, parameter: Tensor, state: dict[str, Any], rows: Tensor) -> Tensor:
        """Where the moments of rows are, (U,); those that are new get a place, and moments of zero."""
        if parameter not in self._slots:
            self._slots[parameter] = rows.new_full((len(parameter),), -1)
            self._slots[parameter][state["rows"]] = torch.arange(len(state["rows"]), device=rows.device)
        slots = self._slots[parameter]
        new = rows[slots[rows] < 0]
        if len(new):
            held = len(state["rows"])
            total = held + len(new)
            slots[new] = torch.arange(held, total, device=rows.device)
            state["rows"] = torch.cat([state["rows"], new])
            for name in _MOMENTS:
                moments = state[name]
                if total > len(moments):
                    room = min(len(parameter), max(total, int(_GROWTH * held)))
                    state[name] = moments.new_empty((room, *moments.shape[1:]))
                    state[name][:held] = moments[:held]
                state[name][held:total] = 0
        return slots[rows]


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as a file has it: the moments of touched rows without the room for more."""
    if "rows" not in state:
        return state
    moments = {_OF_ROWS + name: state[name][: len(state["rows"])].clone() for name in _MOMENTS}
    return {name: value for name, value in state.items() if name not in _MOMENTS} | moments


def holds_rows(path: Path) -> bool:
    """Whether a file with the state of an optimizer has moments of some rows alone; False where there is none."""
    if not path.exists():
        return False
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return any("rows" in state for state in content.get("state", {}).values())


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient with each row once. The values are copied only where one occurs twice, or they are in disorder.

    A gradient that arrives at a parameter is not known to be coalesced any more, even if it was.
    """
    rows = gradient._indices()[0]
    if gradient.is_coalesced() or not bool((rows[1:] > rows[:-1]).all()):
        return gradient.coalesce()
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False
    )
