"""Which entries are positive, at one bit each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_signs(h: Tensor) -> Tensor:
    """Return one bit per entry of ``h``: 0 where it is at most 0, else 1 (for NaN, too, so that gradients show it)."""
    bits = (h <= 0).logical_not_().flatten().view(torch.uint8)
    # Bit i of byte j is entry i * num_bytes + j: eight passes over long rows, which vectorise.
    planes = F.pad(bits, (0, -bits.numel() % 8)).view(8, -1)
    packed = planes[0].clone()
    for place in range(1, 8):
        packed.add_(planes[place], alpha=1 << place)
    return packed


def unpack_signs(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bits of :func:`pack_signs` as zeros and ones (uint8) of the original shape."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    bits = (packed >> places) & 1
    numel = 1
    for size in shape:
        numel *= size
    return bits.flatten()[:numel].view(shape)
