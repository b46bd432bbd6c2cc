"""A step of AdamW for some rows of a table, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Numbers that are updated together: what is computed with them stays in the processor's cache.
_PART = 1 << 17


class Rows(NamedTuple):
    """What a step changes, U rows of it.

    Attributes:
        rows: of the table, each once, (U,).
        slots: of the moments, (U,).
        gradient: (U, ...).
        table: (P, ...).
        first, second: moments, (slots, ...).
    """

    rows: Tensor
    slots: Tensor
    gradient: Tensor
    table: Tensor
    first: Tensor
    second: Tensor


class AdamStep(NamedTuple):
    """The numbers of a step.

    Attributes:
        decay: what is left of a value, 1 - rate * weight_decay.
        beta1, beta2: what is left of the moments.
        step_size: the rate over the first moment's bias correction.
        root: the root of the second moment's bias correction.
        eps: added to the denominator.
    """

    decay: float
    beta1: float
    beta2: float
    step_size: float
    root: float
    eps: float


def update_rows(rows: Rows, step: AdamStep) -> None:
    """Update moments and values of the rows in place, as ``torch.optim.AdamW`` does; no others."""
    size = max(1, _PART // max(1, rows.table[0].numel()))
    for start in range(0, len(rows.rows), size):
        row, slot, gradient = (tensor[start : start + size] for tensor in rows[:3])
        first = rows.first[slot].lerp_(gradient, 1 - step.beta1)
        second = rows.second[slot].mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
        rows.first.index_copy_(0, slot, first)
        rows.second.index_copy_(0, slot, second)
        value = rows.table[row].mul_(step.decay)
        value.addcdiv_(first, second.sqrt_().div_(step.root).add_(step.eps), value=-step.step_size)
        rows.table.index_copy_(0, row, value)
