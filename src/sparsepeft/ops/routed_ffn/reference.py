"""The routed FFN, equation for equation: the dense FFN with the unchosen blocks' activations set to zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.routed_ffn.projections import Activation, Projection, project
from sparsepeft.ops.routed_ffn.routing import Routing


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
    num_blocks = routing.logits.shape[-1]
    factor = torch.exp(routing.log_weights - routing.log_weights.detach())  # w / stop_gradient(w): exactly 1
    factors = torch.zeros_like(routing.logits).scatter(-1, routing.blocks, factor)  # (N, G), zero where not chosen
    inner = activation(project(x, up)) if gate is None else activation(project(x, gate)) * project(x, up)
    inner = F.dropout(inner, dropout)  # (N, I)
    chosen = inner.unflatten(-1, (num_blocks, -1)) * factors.to(x.dtype).unsqueeze(-1)  # (N, G, I / G)
    return project(chosen.flatten(-2), down)
