"""How a model is made sparse."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

GRANULARITIES = ("token", "block")
ASSIGNMENTS = ("clustered", "contiguous")


@dataclass(frozen=True)
class SptConfig:
    """What :func:`sparsepeft.sparsify` does to a model.

    Source: SPT, sparse multi-head attention and routed FFN. Differs: see ``docs/spt.md``.

    Args:
        attention: make self-attention sparse.
        ffn: route the FFNs.
        top_l: keys that a query attends to: a count, or a fraction (below 1) of the calibration length, which becomes a
            count at conversion.
        granularity: ``"token"`` selects keys for each query, ``"block"`` blocks of keys for each block of queries.
        block_size: positions in such a block.
        subvector_dim: W, channels that are quantized together; divides the head size.
        num_codewords: C, codewords for each sub-vector, at most 16.
        codebook_interval: optimizer steps between two refreshes of the codebooks; 0 leaves them as calibrated.
        keep_self: a query's own position is always kept.
        keep_first: the first position is always kept.
        num_blocks: G, blocks that an FFN's inner dimension is cut into.
        num_active_blocks: G', blocks that a token uses.
        block_assignment: ``"clustered"`` puts neurons into a block that add to the output at the same time (without
            calibration data: of like weights), ``"contiguous"`` neighbours.
        compensation_rank: rank of a linear map of an FFN's input that stands in for the blocks a token does not use,
            fitted to the calibration batch and trained on with the router; 0 adds nothing, as SPT does.
        load_balancing_coef: weight of the loss that keeps all blocks in use.
        layers_to_transform: indices of the layers; all if None.
        seed: of the clusterings.

    Raises:
        ValueError: a value is out of range.
    """

    attention: bool = True
    ffn: bool = True
    top_l: int | float = 1 / 8
    granularity: str = "token"
    block_size: int = 64
    subvector_dim: int = 8
    num_codewords: int = 16
    codebook_interval: int = 20
    keep_self: bool = True
    keep_first: bool = True
    num_blocks: int = 8
    num_active_blocks: int = 4
    block_assignment: str = "clustered"
    compensation_rank: int = 0
    load_balancing_coef: float = 0.01
    layers_to_transform: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.attention and not self.ffn:
            raise ValueError("attention and ffn are both False, so nothing would become sparse; set one of them.")
        for name, choices in (("granularity", GRANULARITIES), ("block_assignment", ASSIGNMENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} was given; expected one of {', '.join(choices)}.")
        for name in ("block_size", "subvector_dim", "num_codewords", "num_blocks", "num_active_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} was given; expected a whole number of at least 1.")
        rank = self.compensation_rank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"compensation_rank={rank!r} was given; expected a whole number, 0 for none.")
        if isinstance(self.top_l, bool) or not self.top_l > 0 or (self.top_l >= 1 and self.top_l != int(self.top_l)):
            raise ValueError(
                f"top_l={self.top_l!r} was given; expected a count of keys, or a fraction of the calibration length "
                "between 0 and 1."
            )
        if self.num_codewords > 16:
            raise ValueError(f"num_codewords={self.num_codewords} was given, but a code has 4 bits: at most 16.")
        if self.num_active_blocks > self.num_blocks:
            raise ValueError(
                f"num_active_blocks={self.num_active_blocks} was given with num_blocks={self.num_blocks}; a token can "
                "use at most all blocks."
            )
        if self.codebook_interval < 0 or self.load_balancing_coef < 0:
            raise ValueError(
                f"codebook_interval={self.codebook_interval} and load_balancing_coef={self.load_balancing_coef} were "
                "given; neither can be negative."
            )
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))

    def with_length(self, length: int) -> SptConfig:
        """A copy with ``top_l`` as a count, for a calibration batch of ``length`` positions."""
        count = max(1, round(self.top_l * length)) if self.top_l < 1 else int(self.top_l)
        return dataclasses.replace(self, top_l=count)

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SptConfig:
        """The config that :meth:`to_json` wrote; keys that this version does not know are an error."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"The sparse model was saved with settings that this version does not know ({', '.join(unknown)}); "
                "update sparsepeft."
            )
        return cls(**values)
