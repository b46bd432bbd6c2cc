"""Dropout that backward draws again instead of remembering it."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed() -> int:
    """Return a seed from the default CPU generator, so that ``torch.manual_seed`` settles every draw."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()).item())


class Draws:
    """A sequence of dropout masks; the same seed and the same order of calls give the same masks."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def masks(self, like: Tensor, probabilities: tuple[float, ...]) -> list[Tensor | None]:
        """Return a mask for each probability: zeros with it, else 1 / (1 - probability); None if nothing is dropped."""
        return [self._mask(like, 1 - probability) if probability else None for probability in probabilities]

    def _mask(self, like: Tensor, keep: float) -> Tensor:
        return torch.empty_like(like).bernoulli_(keep, generator=self._generator).div_(keep)


def masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the product, or the tensor itself where there is no mask."""
    return tensor if mask is None else tensor * mask
