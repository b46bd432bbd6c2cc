"""The codebooks of a sparse attention layer: fitted to a calibration batch, refreshed while training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsepeft.models.masks import SparseMask
from sparsepeft.ops.sparse_attention import fit_codebooks, refresh_codebooks
from sparsepeft.spt.config import SptConfig

_MAX_VECTORS = 2048  # for each head; more make a refresh slower, not better
_LEAST_WEIGHT = 1e-3  # of the head's largest; some models have channels in which all queries are zero


class Codebooks(nn.Module):
    """The codebooks of one attention layer, and what those after the next optimizer step are made from.

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
        self.seen: _Sample | None = None

    @classmethod
    def fit(cls, query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> Codebooks:
        """Fit them to what a layer attends with, (B, H, Tq, D) and (B, Hkv, Tk, D).

        Raises:
            ValueError: there are too few vectors, or some are not finite.
        """
        if config.granularity == "block" and config.similarity == "inner_product":
            return cls(key.new_empty(0, dtype=torch.float32))
        sample = _sample(query, key, mask, config)
        weights = _channel_weights(sample)
        sizes = {"subvector_dim": config.subvector_dim, "num_codewords": config.num_codewords, "seed": config.seed}
        return cls(fit_codebooks(sample.vectors, channel_weights=weights, **sizes), weights)

    def choice(self) -> dict[str, Tensor | None]:
        """By what keys are chosen, as arguments of the op."""
        return {
            "codebooks": self.codebooks if self.codebooks.numel() else None,
            "channel_weights": self.channel_weights,
        }

    @torch.no_grad()
    def prepare(self, query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> None:
        """Keep what the next codebooks are made from, after the step: gradient checkpointing runs the layer again."""
        if self.codebooks.numel():
            self.seen = _sample(query, key, mask, config)

    @torch.no_grad()
    def step(self, is_due: bool) -> None:
        """Compute the codebooks anew if it is time, in all processes to the same."""
        if is_due and _in_all_processes(self.seen is not None, self.codebooks.device):
            assert self.seen is not None
            sample = _of_all_processes(self.seen)
            weights = _channel_weights(sample)
            # A diverging run fails elsewhere, with a better message.
            if sample.vectors.numel() and all(each is None or each.isfinite().all() for each in (*sample, weights)):
                self.codebooks.copy_(refresh_codebooks(self.codebooks, sample.vectors, channel_weights=weights))
                if self.channel_weights is not None and weights is not None:
                    self.channel_weights.copy_(weights)
        self.seen = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.expected, self.seen = True, None


class _Sample(NamedTuple):
    """What codebooks are made from.

    Attributes:
        vectors: of each key head, (Hkv, N, D).
        squares: of the queries' channels, the sum, (Hkv, D); None where queries are coded as well.
        num_queries: in that sum.
    """

    vectors: Tensor
    squares: Tensor | None
    num_queries: Tensor


def _sample(query: Tensor, key: Tensor, mask: SparseMask, config: SptConfig) -> _Sample:
    """Keys without padding; queries, too, where these are coded as well, else their channels' squares."""
    keys = _evenly_spaced(key.transpose(1, 2)[mask.key_mask].transpose(0, 1)).detach()  # (Hkv, N, D)
    queries = query.transpose(1, 2)[mask.key_mask[:, mask.query_positions]]  # (N, H, D)
    queries = queries.unflatten(1, (key.shape[1], -1)).transpose(0, 1).flatten(1, 2).detach()
    count = torch.tensor(queries.shape[1], device=key.device)
    if config.similarity == "matches":
        return _Sample(torch.cat([_evenly_spaced(queries), keys], dim=1), None, count)
    return _Sample(keys, queries.float().square().sum(1), count)


def _channel_weights(sample: _Sample) -> Tensor | None:
    """How much the error of each channel of the keys counts, (Hkv, D): the queries' root mean squares there."""
    if sample.squares is None:
        return None
    weights = (sample.squares / sample.num_queries).sqrt()
    largest = weights.amax(-1, keepdim=True)
    return torch.where(largest > 0, weights.maximum(_LEAST_WEIGHT * largest), 1)


def _in_all_processes(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in every process that trains; a layer may be skipped in one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    return bool(flags)


def _of_all_processes(sample: _Sample) -> _Sample:
    """The samples of all processes that train together as one: in their order, as rows are in a single one's batch."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sample
    vectors, squares, num_queries = sample
    counts = [torch.zeros_like(num_queries) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.full_like(num_queries, vectors.shape[1]))
    sizes = [int(count) for count in counts]
    padded = vectors.new_zeros(vectors.shape[0], max(sizes), vectors.shape[2])
    padded[:, : vectors.shape[1]] = vectors
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    num_queries = num_queries.clone()
    for each in (num_queries, squares):
        if each is not None:
            dist.all_reduce(each)
    whole = torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)
    return _Sample(_evenly_spaced(whole), squares, num_queries)


def _evenly_spaced(vectors: Tensor) -> Tensor:
    """At most :data:`_MAX_VECTORS` of the vectors (Hkv, N, D), evenly spaced along N."""
    count = vectors.shape[1]
    if count <= _MAX_VECTORS:
        return vectors
    return vectors[:, torch.linspace(0, count - 1, _MAX_VECTORS, device=vectors.device).long()]
