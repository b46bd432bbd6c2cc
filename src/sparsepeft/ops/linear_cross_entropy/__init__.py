"""The cross entropy of a linear head, without all of its logits at once: one signature, several implementations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.linear_cross_entropy.pytorch import linear_cross_entropy_in_chunks
from sparsepeft.ops.linear_cross_entropy.reference import head_logits, linear_cross_entropy_reference
from sparsepeft.ops.registry import Implementation, Operator

__all__ = ["head_logits", "linear_cross_entropy"]

_REDUCTIONS = ("mean", "sum")


class HeadArguments(NamedTuple):
    """What the choice depends on; see :func:`linear_cross_entropy`."""

    hidden: Tensor

    @classmethod
    def bind(cls, hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> HeadArguments:
        """Take the arguments of :func:`linear_cross_entropy`."""
        return cls(hidden)


def _why_not_traced(_: HeadArguments) -> str | None:
    return "a compiled graph takes the logits at once" if torch.compiler.is_compiling() else None


OPERATOR = Operator(
    "linear_cross_entropy",
    HeadArguments.bind,
    [
        Implementation("reference", 0, "the definition, which keeps all logits"),
        Implementation(
            "torch",
            10,
            "the logits of some tokens at a time, their gradient taken at once",
            why_not_automatic=_why_not_traced,
        ),
    ],
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Cross entropy of a linear head's logits, of which only those of a chunk of tokens are in memory at a time.

    z_i = scale * (W h_i + b),  or with a softcap c  z_i = c * tanh(scale * (W h_i + b) / c)
    loss = sum over i with labels_i != ignore_index of  log(sum_v exp(z_iv)) - z_i,labels_i,

    divided by the number of those i for ``reduction="mean"``. For a vocabulary of 262,144 the logits of 2,048 tokens
    take 2.1 GB in float32, and as much again for each of their softmax and gradient.

    The gradient of ``hidden``, and those of ``weight`` and ``bias`` where they are trained, are taken together with the
    loss, as no logits are left for later; backward multiplies them by the gradient that arrives. A frozen weight costs
    no gradient product, a token whose label is ignored no product at all. There are no second derivatives.

    Source: the fused linear cross entropy of Liger-Kernel (arXiv:2410.10989, section 3.2). Differs: in plain PyTorch,
    softmaxes in float32, chunks of as many tokens as fit a fixed size.

    Dtypes: logits are taken in the dtype of ``hidden`` (or autocast's where it is on), to which ``weight`` and ``bias``
    are converted, and softmaxes in float32 at least.

    Args:
        hidden: what the head reads, (..., D), N tokens in all.
        weight: W, (V, D).
        labels: of the same tokens, (...), int64; not shifted.
        bias: b, (V,).
        scale: factor of the logits.
        softcap: c, bounds the logits' size; None leaves them as they are.
        ignore_index: label of tokens that do not count.
        reduction: ``"mean"``, NaN where no token counts, or ``"sum"``, which is 0 there.
        impl: ``"auto"``, ``"reference"`` or ``"torch"``; see :func:`sparsepeft.ops.explain`.

    Returns:
        A scalar, in float32 at least.

    Raises:
        TypeError: ``hidden`` is not floating point, or ``labels`` are not int64.
        ValueError: shapes do not fit, or ``reduction`` or ``impl`` is unknown.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(2, 7, 32, requires_grad=True), torch.randn(1000, 32)
        >>> loss = linear_cross_entropy(hidden, weight, torch.randint(1000, (2, 7)))
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([2, 7, 32])
    """
    _check(hidden, weight, labels, bias, reduction)
    impl = OPERATOR.choose(impl, HeadArguments(hidden))
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    tokens, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    weight, bias = weight.to(hidden.dtype), bias if bias is None else bias.to(hidden.dtype)
    compute = linear_cross_entropy_reference if impl == "reference" else linear_cross_entropy_in_chunks
    with torch.autocast(hidden.device.type, enabled=False):
        total = compute(tokens, weight, labels, bias, scale, softcap, ignore_index)
    return total if reduction == "sum" else total / labels.ne(ignore_index).sum()


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden has dtype {hidden.dtype}; expected a floating-point tensor: convert it first.")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels have dtype {labels.dtype}; expected torch.int64: convert them first.")
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and hidden {tuple(hidden.shape)}; expected (V, D) and (..., D)."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected a label for each token of hidden, "
            f"{tuple(hidden.shape[:-1])}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), as weight has rows.")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(_REDUCTIONS)}.")
