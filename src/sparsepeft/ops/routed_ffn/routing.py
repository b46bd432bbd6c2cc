"""Which blocks of the FFN each token uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype, top_k_lowest_index


class Routing(NamedTuple):
    """A router's choice for N tokens: ``num_active`` (G') of G blocks each.

    ``blocks`` (N, G') holds the chosen blocks, in no particular order, without repetition. ``log_weights`` (N, G') are
    the logarithms of the router's probabilities for them, and carry the gradient to the router. ``logits`` (N, G) are
    what the probabilities are the softmax of, for the load-balancing loss.
    """

    blocks: Tensor
    log_weights: Tensor
    logits: Tensor


def route(x: Tensor, router_weight: Tensor, router_bias: Tensor | None = None, *, num_active: int) -> Routing:
    r"""Choose the ``num_active`` blocks with the highest router logits; of equal logits the lowest block.

    logits = x W^T + b;  w = softmax(logits) over all G blocks.

    Source: arXiv:2312.10365, section 4.2. Differs: w never scales a block's output, see :func:`routed_ffn`.

    Dtypes: the product is taken in the dtype of ``x`` (autocast's, where that is on), the softmax in float32 at least.

    Args:
        x: hidden states, (..., D); leading dimensions are flattened to N tokens.
        router_weight: (G, D).
        router_bias: (G,) or None.
        num_active: blocks per token (G'), 1 <= num_active <= G.

    Raises:
        TypeError: a tensor is not floating point, or ``num_active`` is not an int.
        ValueError: shapes do not fit, or ``num_active`` is out of range.
    """
    _check(x, router_weight, router_bias, num_active)
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if router_bias is None else router_bias.to(dtype)
        logits = F.linear(x.reshape(-1, x.shape[-1]).to(dtype), router_weight.to(dtype), bias)
        logits = logits.to(softmax_dtype(dtype))
        _, blocks = top_k_lowest_index(logits.detach(), num_active)
        blocks = blocks.contiguous()  # backward keeps them: not a view of a sorting of all blocks
        return Routing(blocks, torch.log_softmax(logits, -1).gather(-1, blocks), logits)


def column_weights(columns: Tensor) -> Tensor:
    """Return ||d_i||^2 of the down projection's columns, cut into blocks: (G, W, D) -> (G, W), in float32 at least."""
    squares = columns.square().flatten(0, 1)  # (I, D)
    sums = torch.mm(squares.new_ones(1, squares.shape[1]), squares.t())  # a product: reductions are ten times slower
    return sums.view(columns.shape[:2]).to(softmax_dtype(columns.dtype))


def largest_blocks(active: Tensor, weights: Tensor, num_active: int) -> Tensor:
    """Choose the blocks that add most to the output, sum of a_i^2 ||d_i||^2; of equal ones the lowest.

    Args:
        active: what enters the down projection, (N, I).
        weights: ||d_i||^2, (G, I / G).
        num_active: G'.

    Returns:
        (N, G'), in no particular order.
    """
    contributions = active.to(weights.dtype).square().unflatten(-1, weights.shape).mul_(weights).sum(-1)
    return top_k_lowest_index(contributions, num_active)[1]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with ``x`` are taken: autocast's, where it is on and applies, else its own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _check(x: Tensor, router_weight: Tensor, router_bias: Tensor | None, num_active: int) -> None:
    for name, tensor in (("x", x), ("router_weight", router_weight), ("router_bias", router_bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor: convert it first.")
    if x.ndim < 1:
        raise ValueError("x is a scalar; expected hidden states of shape (..., D).")
    if router_weight.ndim != 2 or router_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"router_weight has shape {tuple(router_weight.shape)}; expected (G, {x.shape[-1]}), one row per block."
        )
    num_blocks = router_weight.shape[0]
    if router_bias is not None and tuple(router_bias.shape) != (num_blocks,):
        raise ValueError(f"router_bias has shape {tuple(router_bias.shape)}; expected ({num_blocks},).")
    if not isinstance(num_active, int) or isinstance(num_active, bool):
        raise TypeError(f"num_active is {num_active!r}; expected an int between 1 and {num_blocks}.")
    if not 1 <= num_active <= num_blocks:
        raise ValueError(
            f"num_active is {num_active}, but the router has {num_blocks} blocks: "
            f"choose 1 <= num_active <= {num_blocks}."
        )
