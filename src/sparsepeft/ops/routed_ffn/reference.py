"""The routed and the exact FFN, equation for equation: dense FFNs whose unchosen blocks count, or learn, nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.routed_ffn.projections import Activation, Projection, project
from sparsepeft.ops.routed_ffn.routing import Routing, column_weights, largest_blocks


def routed_ffn_reference(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None,
    activation: Activation,
    routing: Routing,
    dropout: float,
) -> Tensor:
    """Compute the routed FFN of ``x``, (N, D), with dense products; see :func:`routed_ffn`."""
    factor = torch.exp(routing.log_weights - routing.log_weights.detach())  # w / stop_gradient(w): exactly 1
    factors = torch.zeros_like(routing.logits).scatter(-1, routing.blocks, factor)  # (N, G), zero where not chosen
    inner = F.dropout(_inner(x, up, gate, activation), dropout)  # (N, I)
    return project(_scaled(inner, factors), down)


def exact_ffn_reference(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None,
    activation: Activation,
    num_blocks: int,
    num_active: int,
    dropout: float,
) -> Tensor:
    """Compute the exact FFN of ``x``, (N, D), with dense products; see :func:`exact_ffn`."""
    inner = F.dropout(_inner(x, up, gate, activation), dropout)  # (N, I)
    columns = down.weight.detach().t().unflatten(0, (num_blocks, -1))  # (G, I / G, D)
    blocks = largest_blocks(inner.detach(), column_weights(columns), num_active)
    is_chosen = inner.new_zeros(x.shape[0], num_blocks).scatter(-1, blocks, 1.0)

    def outlet(states: Tensor, weight: Tensor) -> Tensor:
        """The value of all blocks, the gradient of the chosen ones."""
        value = F.linear(states, weight.to(x.dtype)).detach()
        chosen = F.linear(_scaled(states, is_chosen), weight.to(x.dtype))
        return value + (chosen - chosen.detach())

    output = outlet(inner, down.weight)
    for low in down.lora:
        read = outlet(F.dropout(inner, low.dropout), low.down)
        output = output + low.scaling * F.linear(read, low.up.to(x.dtype))
    return output if down.bias is None else output + down.bias.to(x.dtype)


def _inner(x: Tensor, up: Projection, gate: Projection | None, activation: Activation) -> Tensor:
    return activation(project(x, up)) if gate is None else activation(project(x, gate)) * project(x, up)


def _scaled(inner: Tensor, factors: Tensor) -> Tensor:
    """Each block of (N, I) times its factor, (N, G)."""
    return (inner.unflatten(-1, (factors.shape[-1], -1)) * factors.to(inner.dtype).unsqueeze(-1)).flatten(-2)
