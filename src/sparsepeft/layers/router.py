"""Which blocks an FFN is cut into and which of them a token uses: where both start before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsepeft.layers.compensation import Compensation, fit_compensation
from sparsepeft.models.sublayers import FeedForward, weight_of
from sparsepeft.ops.ridge import fit_ridge
from sparsepeft.ops.routed_ffn import LowRank, Projection, project

_RIDGE = 1e-2  # of the inputs' variance
_FEATURES = 512
_COMPENSATION = tuple(f"compensation_{name}" for name in Compensation._fields)  # a router's parameters
_PARTS = ("gate", "up", "down")


class InitialRouter(NamedTuple):
    """A router before training, and what stands in for the blocks that it does not choose.

    Attributes:
        neuron_order: the neurons in an order in which every I / G neighbours are a block, (I,).
        weight, bias: of the blocks' logits, (G, D) and (G,).
        compensation: of the blocks that are not chosen, if there is one.
        updates: of the ``"gate"``, ``"up"`` and ``"down"`` projections, the neurons in blocks, if there are any.
    """

    neuron_order: Tensor  # (I,)
    weight: Tensor  # (G, D)
    bias: Tensor  # (G,)
    compensation: Compensation | None = None
    updates: dict[str, LowRank] | None = None

    def to(self, device: torch.device) -> InitialRouter:
        """The same on a device."""
        return InitialRouter.of({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def detach(self) -> InitialRouter:
        """The same without a graph."""
        return InitialRouter.of({name: tensor.detach() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of it, under the names that it is saved by."""
        named = {"neuron_order": self.neuron_order, "weight": self.weight, "bias": self.bias}
        named |= dict(zip(_COMPENSATION, self.compensation or (), strict=False))
        for part, update in (self.updates or {}).items():
            named |= {f"update_{part}_in": update.down, f"update_{part}_out": update.up}
        return named

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> InitialRouter:
        """From what :meth:`tensors` gave.

        Raises:
            KeyError: one is missing.
        """
        compensation = None
        if _COMPENSATION[0] in tensors:
            compensation = Compensation(*(tensors[name] for name in _COMPENSATION))
        updates = {
            part: LowRank(tensors[f"update_{part}_in"], tensors[f"update_{part}_out"])
            for part in _PARTS
            if f"update_{part}_in" in tensors
        }
        return cls(tensors["neuron_order"], tensors["weight"], tensors["bias"], compensation, updates or None)


class Router(nn.Module):
    """Logits of blocks: ``weight`` (G, D) and ``bias`` (G,), and the order of neurons that says what the blocks are.

    The tensors of a compensation and of low-rank updates are parameters, too.
    """

    shared = ("neuron_order",)  # the weights are in it, for all adapters
    neuron_order: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, start: InitialRouter) -> None:
        super().__init__()
        self.register_buffer("neuron_order", start.neuron_order)
        for name, tensor in start.tensors().items():
            if name not in self.shared:
                self.register_parameter(name, nn.Parameter(tensor.to(torch.float32, copy=True)))

    @property
    def compensation(self) -> Compensation | None:
        """What stands in for the blocks that are not used, if anything does."""
        return self._now().compensation

    @property
    def updates(self) -> dict[str, LowRank]:
        """Low-rank updates of the projections, by their part."""
        return self._now().updates or {}

    def _now(self) -> InitialRouter:
        return InitialRouter.of({"neuron_order": self.neuron_order, **dict(self.named_parameters())})


@torch.no_grad()
def start_from_weights(feed_forward: FeedForward, order: Tensor, num_blocks: int) -> InitialRouter:
    """A neuron fires where its weights point, so a block does where the mean of its neurons' weights points."""
    rows = deciding_weight(feed_forward)[order]
    centres = rows.view(num_blocks, -1, rows.shape[1]).mean(1)
    return InitialRouter(order, centres, centres.new_zeros(num_blocks))


@torch.no_grad()
def start_from_outputs(
    feed_forward: FeedForward, order: Tensor, num_blocks: int, inputs: Tensor, inner: Tensor
) -> InitialRouter:
    """Predict from an input how much each block adds to the output: ridge regression of the logarithm of its norm.

    Args:
        feed_forward: the dense FFN.
        order: of its neurons, (I,).
        num_blocks: G.
        inputs: hidden states (N, D) that go into it.
        inner: what they become before the down projection, see :func:`inner_states`.
    """
    inputs = inputs.float()
    parts = inner[:, order].chunk(num_blocks, dim=1)
    columns = projection_of(feed_forward, feed_forward.names.down).weight[:, order].chunk(num_blocks, dim=1)
    norms = torch.stack([(part @ rows.T).norm(dim=1) for part, rows in zip(parts, columns, strict=True)], dim=1)
    targets = norms.clamp_min(1e-6).log()  # (N, G)
    fitted = fit_ridge(inputs, targets, _RIDGE)
    weight = fitted.weight.T
    return InitialRouter(order, weight, fitted.mean_out - weight @ fitted.mean_in)


@torch.no_grad()
def compensated(
    feed_forward: FeedForward, start: InitialRouter, num_active: int, rank: int, inputs: Tensor, inner: Tensor
) -> InitialRouter:
    """With a linear stand-in of a rank for the blocks that the router leaves out at its start.

    Args:
        feed_forward: the dense FFN.
        start: of its router.
        num_active: G', blocks that a token uses.
        rank: R.
        inputs: hidden states (N, D) that go into it.
        inner: what they become before the down projection, see :func:`inner_states`.
    """
    logits = torch.nn.functional.linear(inputs.float(), start.weight.float(), start.bias.float())
    is_left_out = torch.ones_like(logits).scatter_(1, logits.topk(num_active, dim=1).indices, 0.0)  # (N, G)
    left_out = inner[:, start.neuron_order] * is_left_out.repeat_interleave(inner.shape[1] // logits.shape[1], dim=1)
    down = projection_of(feed_forward, feed_forward.names.down).weight[:, start.neuron_order]
    return start._replace(compensation=fit_compensation(inputs, left_out @ down.T, rank))


@torch.no_grad()
def activity(feed_forward: FeedForward, inner: Tensor, seed: int) -> Tensor:
    """When each neuron adds how much to the output, against its own mean: (I, F), a random projection of (I, N).

    Args:
        feed_forward: the dense FFN.
        inner: see :func:`inner_states`.
        seed: of the projection.
    """
    weights = projection_of(feed_forward, feed_forward.names.down).weight.norm(dim=0)
    added = inner.abs() * weights  # (N, I)
    added = (added - added.mean(0)).T
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(added.shape[1], min(_FEATURES, added.shape[1]), generator=generator)
    return added @ draw.to(added.device)


def deciding_weight(feed_forward: FeedForward) -> Tensor:
    """The weight that says whether a neuron fires, (I, D): the gate's, where there is one."""
    return weight_of(feed_forward.part(feed_forward.names.gate or feed_forward.names.up)).detach()


@torch.no_grad()
def inner_states(feed_forward: FeedForward, inputs: Tensor) -> Tensor:
    """What goes into the down projection, (N, I) in float32, for hidden states (N, D)."""
    names, inputs = feed_forward.names, inputs.float()
    inner = feed_forward.activation(project(inputs, projection_of(feed_forward, names.gate or names.up)))
    return inner if names.gate is None else inner * project(inputs, projection_of(feed_forward, names.up))


def projection_of(feed_forward: FeedForward, name: str) -> Projection:
    """A linear map of an FFN by its name, in float32."""
    module = feed_forward.part(name)
    bias = getattr(module, "bias", None)
    return Projection(weight_of(module).float(), None if bias is None else bias.float())
