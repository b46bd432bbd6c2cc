"""A low-rank update with which a routed FFN gives the dense output back. Not in SPT; see ``docs/spt.md``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from sparsepeft.layers.compensation import Compensation, held_out
from sparsepeft.layers.router import InitialRouter, projection_of
from sparsepeft.models.sublayers import FeedForward
from sparsepeft.ops.routed_ffn import LowRank, Projection, Routing, project, route, routed_ffn
from sparsepeft.spt.config import SptConfig

_BATCH = 256  # tokens in a step
_LEARNING_RATE = 1e-3
_COMPENSATION_RATE = 1e-2  # of each factor's root mean square, which differs from model to model
_BETAS = (0.9, 0.99)


def reconstruct(
    feed_forward: FeedForward, start: InitialRouter, config: SptConfig, inputs: Tensor, inner: Tensor
) -> InitialRouter:
    r"""Train a low-rank update of a routed FFN's projections, and its compensation, to give the dense output back.

    minimise sum_x ||routed(x) - dense(x)||^2  by Adam, the rate falling as a cosine, over three quarters of the tokens.

    It is kept where the error on the last quarter is less than that of ``start``, whose regressions have seen that
    quarter, too. The router stays as it is: trained along, it chose worse in most layers that were measured.

    Args:
        feed_forward: the dense FFN.
        start: of its router.
        config: number of active blocks, ``reconstruction_steps`` and ``reconstruction_rank``, and the seed.
        inputs: hidden states (N, D) that go into it.
        inner: what they become before the down projection, (N, I), see
            :func:`~sparsepeft.layers.router.inner_states`.

    Returns:
        ``start``, or it with the update and the trained compensation.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if len(inputs) < 2:
        raise ValueError(f"An FFN cannot be reconstructed from {len(inputs)} tokens; pass more calibration_data.")
    inputs = inputs.float()
    projections = _in_blocks(feed_forward, start.neuron_order)
    with torch.no_grad():
        targets = project(inner, projection_of(feed_forward, feed_forward.names.down))  # (N, D)
        routing = route(inputs, start.weight.float(), start.bias.float(), num_active=int(config.num_active_blocks))

    def error(of: InitialRouter, chosen: Tensor) -> Tensor:
        part = Routing(*(tensor[chosen] for tensor in routing))
        updated = {
            name: each._replace(lora=(of.updates[name],) if of.updates else ()) for name, each in projections.items()
        }
        output = routed_ffn(
            inputs[chosen],
            updated["up"],
            updated["down"],
            part,
            gate=updated.get("gate"),
            activation=feed_forward.activation,
        )
        if of.compensation is not None:
            output = output + of.compensation(inputs[chosen])
        return mse_loss(output, targets[chosen])

    generator = torch.Generator().manual_seed(config.seed)
    trained = _trainable(start, projections, config.reconstruction_rank, generator)
    is_held_out = held_out(len(inputs), inputs.device)
    known = (~is_held_out).nonzero()[:, 0]
    optimizer = torch.optim.Adam(_groups(trained), betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.reconstruction_steps)
    scale = targets[known].square().mean().clamp_min(1e-30)
    with torch.enable_grad():
        for _ in range(config.reconstruction_steps):
            drawn = torch.randint(len(known), (min(_BATCH, len(known)),), generator=generator)
            optimizer.zero_grad()
            (error(trained, known[drawn.to(known.device)]) / scale).backward()
            optimizer.step()
            schedule.step()
    trained = trained.detach()
    with torch.no_grad():
        return trained if error(trained, is_held_out) < error(start, is_held_out) else start


def _in_blocks(feed_forward: FeedForward, order: Tensor) -> dict[str, Projection]:
    """The projections by their part, ``"gate"``, ``"up"`` and ``"down"``, frozen, with the neurons in their order."""
    names = feed_forward.names
    found = {}
    for part, name in (("gate", names.gate), ("up", names.up), ("down", names.down)):
        if name is not None:
            weight, bias, _ = projection_of(feed_forward, name)
            weight, bias = weight.detach(), None if bias is None else bias.detach()
            if part == "down":
                found[part] = Projection(weight[:, order], bias)
            else:
                found[part] = Projection(weight[order], None if bias is None else bias[order])
    return found


def _trainable(
    start: InitialRouter, projections: dict[str, Projection], rank: int, generator: torch.Generator
) -> InitialRouter:
    """``start`` with an update that adds nothing yet, and leaves that require a gradient."""
    updates = {}
    for part, projection in projections.items():
        weight = projection.weight
        down = torch.randn(rank, weight.shape[1], generator=generator).to(weight) * weight.shape[1] ** -0.5
        updates[part] = LowRank(down.requires_grad_(), weight.new_zeros(weight.shape[0], rank).requires_grad_())
    if start.compensation is None:
        return start._replace(updates=updates)
    copies = (tensor.float().detach().clone().requires_grad_() for tensor in start.compensation)
    return start._replace(updates=updates, compensation=Compensation(*copies))


def _groups(trained: InitialRouter) -> list[dict]:
    factors = [tensor for update in (trained.updates or {}).values() for tensor in (update.down, update.up)]
    groups = [{"params": factors, "lr": _LEARNING_RATE}]
    for tensor in trained.compensation or ():
        rate = _COMPENSATION_RATE * float(tensor.detach().square().mean().sqrt())
        groups.append({"params": [tensor], "lr": rate})
    return groups
