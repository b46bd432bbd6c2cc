"""Ridge regression."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ridge(NamedTuple):
    """``(x - mean_in) @ weight + mean_out``, and what it was solved from."""

    weight: Tensor  # (D, O)
    mean_in: Tensor  # (D,)
    mean_out: Tensor  # (O,)
    gram: Tensor  # (D, D), of the centred inputs, with the ridge


def fit_ridge(inputs: Tensor, targets: Tensor, ridge: float) -> Ridge:
    """Predict ``targets`` (N, O) from ``inputs`` (N, D); the ridge is a share of the inputs' variance."""
    mean_in, mean_out = inputs.mean(0), targets.mean(0)
    centred = inputs - mean_in
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * len(inputs) * inputs.var() + 1e-6)
    return Ridge(torch.linalg.solve(gram, centred.T @ (targets - mean_out)), mean_in, mean_out, gram)
