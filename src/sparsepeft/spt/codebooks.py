"""The codebooks of a sparse attention layer: fitted to a calibration batch, refreshed while training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsepeft.models.masks import SparseMask
from sparsepeft.ops.sparse_attention import fit_codebooks, refresh_codebooks
from sparsepeft.spt.config import SptConfig

_MAX_VECTORS = 2048  # for each head; more make a refresh slower, not better
_LEAST_WEIGHT = 1e-3  # of the head's largest; some models have channels in which all queries are zero


class Codebooks(nn.Module):
    """The codebooks of one attention layer, and those it may have after the next optimizer step.

    Args:
        codebooks: (Hkv, M, C, W), or without entries where keys are chosen by none.
        channel_weights: (Hkv, D), how much the error of each channel of the keys counts, or None.

    Attributes:
        expected: whether the pass before that step is to compute them; so it is at first, when it is not known yet
            whether a training begins or goes on.
    """

    codebooks: Tensor
    channel_weights: Tensor | None

    def __init__(self, codebooks: Tensor, channel_weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("codebooks", codebooks)
        self.register_buffer("channel_weights", channel_weights)
        self.expected = True
        self.coming: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def fit(cls, query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> Codebooks:
        """Fit them to what a layer attends with, (B, H, Tq, D) and (B, Hkv, Tk, D).

        Raises:
            ValueError: there are too few vectors, or some are not finite.
        """
        if config.granularity == "block" and config.similarity == "inner_product":
            return cls(key.new_empty(0, dtype=torch.float32))
        vectors, weights = _sample(query, key, mask, config)
        sizes = {"subvector_dim": config.subvector_dim, "num_codewords": config.num_codewords, "seed": config.seed}
        return cls(fit_codebooks(vectors, channel_weights=weights, **sizes), weights)

    def choice(self) -> dict[str, Tensor | None]:
        """By what keys are chosen, as arguments of the op."""
        return {
            "codebooks": self.codebooks if self.codebooks.numel() else None,
            "channel_weights": self.channel_weights,
        }

    @torch.no_grad()
    def prepare(self, query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> None:
        """Compute the next codebooks, not used yet: gradient checkpointing will run the layer again with these."""
        if not self.codebooks.numel():
            return
        vectors, weights = _sample(query, key, mask, config)
        # A diverging run fails elsewhere, with a better message.
        if vectors.numel() and vectors.isfinite().all() and (weights is None or weights.isfinite().all()):
            self.coming = refresh_codebooks(self.codebooks, vectors, channel_weights=weights), weights

    def step(self, is_due: bool) -> None:
        """Switch to the next codebooks if it is time, and discard them otherwise."""
        if is_due and self.coming is not None:
            codebooks, weights = self.coming
            self.codebooks.copy_(codebooks)
            if self.channel_weights is not None and weights is not None:
                self.channel_weights.copy_(weights)
        self.coming = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.expected, self.coming = True, None


class _Sample(NamedTuple):
    """What codebooks are made from: vectors of each key head, (Hkv, N, D), and weights of their channels, (Hkv, D)."""

    vectors: Tensor
    channel_weights: Tensor | None


def _sample(query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> _Sample:
    """Keys without padding; queries, too, where these are coded as well, else their channels' root mean squares."""
    keys = _evenly_spaced(key.transpose(1, 2)[mask.key_mask].transpose(0, 1)).detach()  # (Hkv, N, D)
    queries = query.transpose(1, 2)[mask.key_mask[:, mask.query_positions]]  # (N, H, D)
    queries = queries.unflatten(1, (key.shape[1], -1)).transpose(0, 1).flatten(1, 2).detach()
    if config.similarity == "matches":
        return _Sample(torch.cat([_evenly_spaced(queries), keys], dim=1), None)
    weights = queries.float().square().mean(1).sqrt()
    largest = weights.amax(-1, keepdim=True)
    return _Sample(keys, torch.where(largest > 0, weights.maximum(_LEAST_WEIGHT * largest), 1))


def _evenly_spaced(vectors: Tensor) -> Tensor:
    """At most :data:`_MAX_VECTORS` of the vectors (Hkv, N, D), evenly spaced along N."""
    count = vectors.shape[1]
    if count <= _MAX_VECTORS:
        return vectors
    return vectors[:, torch.linspace(0, count - 1, _MAX_VECTORS, device=vectors.device).long()]
