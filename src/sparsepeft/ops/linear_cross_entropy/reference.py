"""Cross entropy of a linear head, equation for equation: all logits, then the loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits z of :func:`linear_cross_entropy`, (..., V), in the dtype of ``hidden``, (..., D)."""
    logits = F.linear(hidden, weight, bias)
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """The summed loss of tokens (N, D) with labels (N,), see :func:`linear_cross_entropy`."""
    logits = head_logits(hidden, weight, bias, scale, softcap).to(softmax_dtype(hidden.dtype))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
