"""How a model is made sparse."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sparsepeft.reprs import changed_fields

GRANULARITIES = ("token", "block")
ASSIGNMENTS = ("clustered", "contiguous")


@dataclass(frozen=True)
class SptConfig:
    """What :func:`sparsepeft.sparsify` does to a model.

    Source: SPT, sparse multi-head attention and routed FFN. Differs: see ``docs/spt.md``.

    Args:
        attention: make self-attention sparse.
        ffn: route the FFNs.
        top_l: keys that a query attends to: an int is a count, a float up to 1 a fraction of the calibration length,
            which becomes a count at conversion (1.0 is all of it).
        granularity: ``"token"`` selects keys for each query, ``"block"`` blocks of keys for each block of queries.
        block_size: positions in such a block.
        subvector_dim: W, channels that are quantized together; divides the head size.
        num_codewords: C, codewords for each sub-vector, at most 16.
        codebook_interval: optimizer steps between two refreshes of the codebooks; 0 leaves them as calibrated.
        keep_self: a query's own position is always kept.
        keep_first: the first position is always kept.
        num_blocks: G, blocks that an FFN's inner dimension is cut into.
        num_active_blocks: G', blocks that a token uses: an int is a count, a float up to 1 a fraction of
            ``num_blocks``, which becomes a count at once.
        block_assignment: ``"clustered"`` puts neurons into a block that add to the output at the same time (without
            calibration data: of like weights), ``"contiguous"`` neighbours.
        compensation_rank: rank of a linear map of an FFN's input that stands in for the blocks a token does not use,
            fitted to the calibration batch and trained on with the router; 0 adds nothing, as SPT does.
        load_balancing_coef: weight of the loss that keeps all blocks in use.
        layers_to_transform: positions of the layers in their stack, or of the one; all if None.
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
    num_active_blocks: int | float = 4
    block_assignment: str = "clustered"
    compensation_rank: int = 0
    load_balancing_coef: float = 0.01
    layers_to_transform: int | tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.attention and not self.ffn:
            raise ValueError("attention and ffn are both False, so nothing would become sparse; set one of them.")
        for name, choices in (("granularity", GRANULARITIES), ("block_assignment", ASSIGNMENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} was given; expected one of {', '.join(choices)}.")
        for name in ("block_size", "subvector_dim", "num_codewords", "num_blocks"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} was given; expected a whole number of at least 1.")
        for name, whole in (("top_l", "the calibration length"), ("num_active_blocks", "num_blocks")):
            value = getattr(self, name)
            if not _is_count(value) and not _is_fraction(value):
                raise ValueError(
                    f"{name}={value!r} was given; expected an int of at least 1, which is a count, or a float above 0 "
                    f"and up to 1, which is a fraction of {whole}."
                )
        rank = self.compensation_rank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"compensation_rank={rank!r} was given; expected a whole number, 0 for none.")
        if self.num_codewords > 16:
            raise ValueError(f"num_codewords={self.num_codewords} was given, but a code has 4 bits: at most 16.")
        object.__setattr__(self, "num_active_blocks", _count(self.num_active_blocks, self.num_blocks))
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
        layers = self.layers_to_transform
        if layers is not None:
            positions = tuple(layers) if isinstance(layers, (list, tuple, set, range)) else (layers,)
            if not positions:
                raise ValueError(
                    "layers_to_transform is empty, so nothing would become sparse; name a layer, or leave it unset for "
                    "all."
                )
            if any(not isinstance(position, int) or isinstance(position, bool) for position in positions):
                raise ValueError(
                    f"layers_to_transform={layers!r} was given; expected the layers' positions, from 0 on."
                )
            object.__setattr__(self, "layers_to_transform", positions)

    def __repr__(self) -> str:
        return changed_fields(self)

    def with_length(self, length: int) -> SptConfig:
        """A copy with ``top_l`` as a count, for a calibration batch of ``length`` positions."""
        return dataclasses.replace(self, top_l=_count(self.top_l, length))

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
        if isinstance(values["top_l"], float) and values["top_l"] > 1:  # formerly a count, too
            values["top_l"] = int(values["top_l"])
        return cls(**values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _count(value: int | float, whole: int) -> int:
    """A count as it is; a fraction of the whole as a count, at least 1."""
    return value if isinstance(value, int) else max(1, round(value * whole))
