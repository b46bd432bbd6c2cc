"""A linear stand-in for the blocks of an FFN that a token does not use. Not in SPT; see ``docs/spt.md``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.ridge import fit_ridge

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the inputs' variance
_HELD_OUT = 4  # every so many tokens one is held out to choose among them


def held_out(num_tokens: int, device: torch.device) -> Tensor:
    """Which tokens are held out to choose on, (N,), bool: a quarter of them, spread evenly."""
    return torch.arange(num_tokens, device=device) % _HELD_OUT == 0


class Compensation(NamedTuple):
    """What is added to a routed FFN's output, ``up @ (down @ x) + bias``."""

    down: Tensor  # (R, D)
    up: Tensor  # (D, R)
    bias: Tensor  # (D,)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the inputs' dtype."""
        down, up, bias = (tensor.to(inputs.dtype) for tensor in self)
        return torch.nn.functional.linear(torch.nn.functional.linear(inputs, down), up, bias)


@torch.no_grad()
def fit_compensation(inputs: Tensor, missing: Tensor, rank: int) -> Compensation:
    """Reduced-rank ridge regression of the missing part of the output on the input.

    The ridge is the one that is best on tokens that were held out; where none helps there, nothing is added until
    training changes it.

    Args:
        inputs: hidden states (N, D) that go into the FFN.
        missing: (N, D), what the blocks that are not used would have added to the output.
        rank: R; at most D is used.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if len(inputs) < 2:
        raise ValueError(f"A compensation cannot be fitted to {len(inputs)} tokens; pass more calibration_data.")
    inputs, missing = inputs.float(), missing.float()
    is_held_out = held_out(len(inputs), inputs.device)
    best, fewest = None, missing[is_held_out].square().sum()
    for ridge in _RIDGES:
        fitted = _fit(inputs[~is_held_out], missing[~is_held_out], rank, ridge)
        left = (missing[is_held_out] - fitted(inputs[is_held_out])).square().sum()
        if left < fewest:
            best, fewest = ridge, left
    fitted = _fit(inputs, missing, rank, _RIDGES[0] if best is None else best)
    if best is None:
        fitted.up.zero_()
        fitted.bias.zero_()
    return fitted


def _fit(inputs: Tensor, missing: Tensor, rank: int, ridge: float) -> Compensation:
    weight, mean_in, mean_out, gram = fit_ridge(inputs, missing, ridge)
    # Of all maps of this rank, the one that changes the fitted values least: their first principal directions.
    root = torch.linalg.cholesky(gram).T
    directions = torch.linalg.svd(root @ weight, full_matrices=False).Vh[:rank]  # (R, D)
    down = directions @ weight.T
    scale = down.norm(dim=1, keepdim=True).clamp_min(1e-30).sqrt()  # both factors of similar size, which trains better
    up = (directions * scale).T.contiguous()
    return Compensation(down / scale, up, mean_out - up @ (down / scale @ mean_in))
