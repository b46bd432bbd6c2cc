"""How a model is made sparse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsepeft.arguments import check_choice, check_flag, check_number, check_whole
from sparsepeft.reprs import changed_fields

GRANULARITIES = ("token", "block")
SIMILARITIES = ("inner_product", "matches")
VALUES = ("exact", "routed")
INFER = ("sparse", "dense")
ASSIGNMENTS = ("clustered", "contiguous")
_WHOLE: dict[str, tuple[int, int | None]] = {  # least and most
    "block_size": (1, None),
    "subvector_dim": (1, None),
    "num_codewords": (2, 16),
    "codebook_interval": (0, None),
    "num_blocks": (1, None),
    "compensation_rank": (0, None),
    "reconstruction_steps": (0, None),
    "reconstruction_rank": (0, None),
    "dense_steps": (0, None),
    "seed": (0, 2**32 - 1),
}
_CHOSEN_LATER = ("block_size", "num_blocks")  # None has a meaning
_NUM_BLOCKS = {"exact": 32, "routed": 8}
_CHOICES = {
    "similarity": SIMILARITIES,
    "granularity": GRANULARITIES,
    "values": VALUES,
    "block_assignment": ASSIGNMENTS,
    "infer": INFER,
}
ATTENTION_OVERRIDES = {"top_l", "granularity", "block_size"}
FFN_OVERRIDES = {"values", "num_blocks", "num_active_blocks", "compensation_rank", "reconstruction_rank"}
_OVERRIDES = {"dense"} | ATTENTION_OVERRIDES | FFN_OVERRIDES
_BEFORE = {"similarity": "matches", "values": "routed"}  # what files mean that do not say


@dataclass(frozen=True)
class SptConfig:
    """What :func:`sparsepeft.sparsify` does to a model.

    Source: SPT, arXiv:2312.10365, sparse multi-head attention and routed FFN. Differs: see ``docs/spt.md``.

    Args:
        attention: make self-attention sparse.
        ffn: make the FFNs sparse.
        top_l: L, keys that a query attends to: an int is a count, a float up to 1 a fraction of the calibration length,
            which becomes a count at conversion (1.0 is all of it).
        similarity: how keys are chosen: ``"inner_product"`` by the query's inner products with the decoded keys,
            ``"matches"`` by the number of codes that query and key share, as in SPT.
        granularity: ``"token"`` selects keys for each query, ``"block"`` blocks of keys for each block of queries.
        block_size: positions in such a block; None takes, at conversion, an eighth of ``top_l``, rounded down to a
            power of two, from 8 to 64.
        subvector_dim: W, channels that are quantized together; divides the head size.
        num_codewords: C, codewords for each sub-vector, 2 to 16: a code has 4 bits.
        codebook_interval: optimizer steps between two refreshes of the codebooks; 0 leaves them as calibrated.
        keep_self: a query's own position is always kept.
        keep_first: the first position is always kept.
        values: what an FFN computes: ``"exact"`` the dense FFN's values, with gradients through each token's largest
            blocks alone; ``"routed"`` the values of the blocks that a router chooses, as in SPT. None is
            ``"exact"``, but ``"routed"`` where ``num_active_blocks`` is a count without ``num_blocks``, as it was used
            before there were exact values.
        num_blocks: G, blocks that an FFN's inner dimension is cut into; None is 32 for exact values, whose gradients
            gain from fine blocks, and 8 for routed ones.
        num_active_blocks: G', blocks that a token uses, with exact values in its backward pass alone: an int is a
            count, a float up to 1 a fraction of ``num_blocks``, which becomes a count at once.
        block_assignment: of routed FFNs: ``"clustered"`` puts neurons into a block that add to the output at the same
            time (without calibration data: those of like weights), ``"contiguous"`` neighbours.
        compensation_rank: of routed FFNs: rank of a linear map of the input that stands in for the blocks a token does
            not use, fitted to the calibration batch and then trained with the router; 0 adds nothing, as in SPT.
        reconstruction_steps: of routed FFNs: steps in which, before fine-tuning, a low-rank update and the linear map
            learn the dense output on the calibration batch; 0 leaves the update out.
        reconstruction_rank: rank of that update of the projections, then trained with the router; 0 has none.
        dense_steps: optimizer steps at the start of training in which the model stays dense.
        dense_labels: while training, positions whose labels count stay dense, and only their context is sparse.
        infer: in eval mode answer as the ``"sparse"`` model, or as the ``"dense"`` one that it was made from.
        budget: how much higher the perplexity may become, such as 0.02 for 2 %: the layers' settings are then chosen by
            measurement on the calibration batch, see :func:`sparsepeft.sparsify`; None takes the settings above.
        overrides: settings of single modules by name, such as ``{"model.layers.0.self_attn": {"top_l": 64},
            "model.layers.1.mlp": {"dense": True}}``; ``"dense"`` leaves one as it is, and ``num_blocks``
            alone keeps the share of blocks that a token uses.
        load_balancing_coef: of routed FFNs: weight of the loss that keeps all blocks in use.
        layers_to_transform: positions of the layers in their stack, or of a single one; all if None.
        seed: of the clusterings.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> SptConfig(top_l=64, num_active_blocks=0.25).num_active_blocks  # of 32
        8
    """

    attention: bool = True
    ffn: bool = True
    top_l: int | float = 1 / 8
    similarity: str = "inner_product"
    granularity: str = "token"
    block_size: int | None = None
    subvector_dim: int = 8
    num_codewords: int = 16
    codebook_interval: int = 20
    keep_self: bool = True
    keep_first: bool = True
    values: str = None  # type: ignore[assignment]  # a word at once
    num_blocks: int = None  # type: ignore[assignment]  # a number at once
    num_active_blocks: int | float = 1 / 2
    block_assignment: str = "clustered"
    compensation_rank: int = 0
    reconstruction_steps: int = 200
    reconstruction_rank: int = 0
    dense_steps: int = 0
    dense_labels: bool = False
    infer: str = "sparse"
    budget: float | None = None
    overrides: dict[str, dict[str, Any]] | None = None
    load_balancing_coef: float = 0.01
    layers_to_transform: int | tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values is None:
            is_of_before = self.num_blocks is None and _is_whole(self.num_active_blocks)
            object.__setattr__(self, "values", "routed" if is_of_before else "exact")
        for name in ("attention", "ffn", "keep_self", "keep_first", "dense_labels"):
            check_flag(name, getattr(self, name))
        if not self.attention and not self.ffn:
            raise ValueError("attention and ffn are both False, so nothing would become sparse; set one of them.")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, (least, most) in _WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in _CHOSEN_LATER:
                check_whole(name, value, least=least, most=most)
        for name, whole in (("top_l", "the calibration length"), ("num_active_blocks", "num_blocks")):
            value = getattr(self, name)
            is_fraction = isinstance(value, float) and 0 < value <= 1
            if not is_fraction and not (_is_whole(value) and value >= 1):
                raise ValueError(
                    f"{name}={value!r} was given; expected an int of at least 1, which is a count, or a float above 0 "
                    f"and up to 1, which is a fraction of {whole}."
                )
        if self.num_blocks is None:
            if self.values == "exact" and not isinstance(self.num_active_blocks, float):
                raise ValueError(
                    f"num_active_blocks={self.num_active_blocks} was given without num_blocks; pass num_blocks, "
                    "too, or a fraction, such as 0.5."
                )
            object.__setattr__(self, "num_blocks", _NUM_BLOCKS[self.values])
        object.__setattr__(self, "num_active_blocks", _count(self.num_active_blocks, self.num_blocks))
        if self.num_active_blocks > self.num_blocks:
            raise ValueError(
                f"num_active_blocks={self.num_active_blocks} was given with num_blocks={self.num_blocks}; a token can "
                "use at most all blocks."
            )
        check_number("load_balancing_coef", self.load_balancing_coef, least=0)
        if self.budget is not None:
            check_number("budget", self.budget, least=0)
            if self.budget > 1:
                raise ValueError(
                    f"budget={self.budget:g} was given, which would let the perplexity rise by {self.budget:.0%}; "
                    "expected a share of at most 1, such as 0.02 for 2 %."
                )
        self._check_overrides()
        layers = self.layers_to_transform
        if layers is not None:
            positions = tuple(layers) if isinstance(layers, (list, tuple, set, range)) else (layers,)
            if not positions:
                raise ValueError(
                    "layers_to_transform is empty, so nothing would become sparse; name a layer, or leave it unset for "
                    "all."
                )
            if not all(map(_is_whole, positions)):
                raise ValueError(
                    f"layers_to_transform={layers!r} was given; expected the layers' positions, from 0 on."
                )
            object.__setattr__(self, "layers_to_transform", positions)

    def __repr__(self) -> str:
        leave_out = ["values"] if self.values == "exact" else []
        if self.num_blocks == _NUM_BLOCKS[self.values] and self.num_active_blocks == _count(1 / 2, self.num_blocks):
            leave_out += ["num_blocks", "num_active_blocks"]
        return changed_fields(self, leave_out)

    def with_length(self, length: int) -> SptConfig:
        """A copy with every ``top_l`` and block size as a count, for a calibration batch of ``length`` positions."""

        def resolved(own: dict[str, Any]) -> dict[str, Any]:
            if "top_l" not in own:
                return own
            count = _count(own["top_l"], length)
            size = own.get("block_size", self.block_size)
            return own | {"top_l": count, "block_size": block_size_of(count) if size is None else size}

        overrides = self.overrides and {name: resolved(own) for name, own in self.overrides.items()}
        return dataclasses.replace(self, **resolved({"top_l": self.top_l}), overrides=overrides)

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
        return cls(**_BEFORE | values)

    def of(self, name: str) -> SptConfig | None:
        """The settings of a module, by its name in the model; None if it stays dense."""
        own = dict((self.overrides or {}).get(name, {}))
        if own.pop("dense", False):
            return None
        if own.get("values", self.values) != self.values and self.num_blocks == _NUM_BLOCKS[self.values]:
            own = {"num_blocks": None} | own
        if "num_blocks" in own:  # of other blocks the same share
            own = {"num_active_blocks": self.num_active_blocks / self.num_blocks} | own
        return dataclasses.replace(self, overrides=None, **own) if own else self

    def _check_overrides(self) -> None:
        if self.overrides is None:
            return
        if not isinstance(self.overrides, Mapping) or not all(isinstance(o, Mapping) for o in self.overrides.values()):
            raise ValueError(
                f"overrides={self.overrides!r:.80} was given; expected settings by the module's name, such as "
                '{"model.layers.0.mlp": {"dense": True}}.'
            )
        for name, own in self.overrides.items():
            if unknown := sorted(own.keys() - _OVERRIDES):
                raise ValueError(
                    f"overrides of {name} has {unknown[0]!r}; expected some of {', '.join(sorted(_OVERRIDES))}."
                )
            try:
                check_flag("dense", own.get("dense", False))
                self.of(name)  # raises for values out of range
            except ValueError as error:
                raise ValueError(f"overrides of {name} cannot be used: {error}") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: int | float, whole: int) -> int:
    """A count as it is; a fraction of the whole as a count, at least 1."""
    return value if isinstance(value, int) else max(1, round(value * whole))


def block_size_of(top_l: int) -> int:
    """The power of two that is at most an eighth of the keys kept, 8 to 64."""
    return 1 << max(3, min(6, (top_l // 8).bit_length() - 1))
