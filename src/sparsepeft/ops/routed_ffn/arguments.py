"""What the blockwise form computes with: its plan, and its tensors with the weights cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sparsepeft.ops.routed_ffn.activations import Activation
from sparsepeft.ops.routed_ffn.groups import Groups
from sparsepeft.ops.routed_ffn.products import Products

MakeProducts = Callable[[Groups], Products]


class Plan(NamedTuple):
    """What is known before the first product."""

    make_products: MakeProducts
    num_blocks: int
    num_inlets: int  # 2 where the FFN is gated
    activation: Activation
    dropouts: tuple[float, ...]  # of the activation, then of what each update of the down projection reads
    seed: int
    keep: str  # for backward: "nothing" (recompute), "signs", or "inner" (what enters the activation)

    def activate(self, inner: list[Tensor]) -> Tensor:
        """Return the activation, (n, W), from what ``up`` gave, or ``gate`` and ``up``."""
        first = self.activation(inner[0])
        return first if self.num_inlets == 1 else first * inner[1]


class Inlet(NamedTuple):
    """A projection into the inner dimension; what its updates read of x is taken beforehand."""

    weight: Tensor  # (G, W, D)
    bias: Tensor | None  # (G, W)
    reads: Tensor | None  # (N, R), the scaling included
    low_up: Tensor | None  # (G, W, R)


class Arguments(NamedTuple):
    """The differentiable arguments, or their gradients, of which any may be None."""

    x: Tensor  # (N, D)
    log_weights: Tensor  # (N, G')
    inlets: list[Inlet]
    outlets: list[Tensor]  # (G, W, D) of the down projection, then (G, W, r) of each of its updates

    @classmethod
    def of(cls, plan: Plan, tensors: Sequence[Any]) -> Arguments:
        """Name the flat tensors: x, log-weights, four of each inlet, the outlets; and cut them into blocks."""
        x, log_weights, *rest = tensors
        count = 4 * plan.num_inlets
        inlets = []
        for start in range(0, count, 4):
            weight, bias, reads, low_up = rest[start : start + 4]
            inlets.append(Inlet(_rows(weight, plan), _rows(bias, plan), reads, _rows(low_up, plan)))
        return cls(x, log_weights, inlets, [_columns(tensor, plan) for tensor in rest[count:]])


def sums_over_blocks(plan: Plan) -> set[int]:
    """Return the places in the flat tensors whose gradients are a sum over a token's blocks, or a scalar of each."""
    return {0, 1, *(4 + 4 * inlet for inlet in range(plan.num_inlets))}


def _rows(tensor: Any, plan: Plan) -> Any:
    return None if tensor is None else tensor.unflatten(0, (plan.num_blocks, -1))


def _columns(tensor: Any, plan: Plan) -> Any:
    return None if tensor is None else tensor.unflatten(1, (plan.num_blocks, -1)).permute(1, 2, 0)
