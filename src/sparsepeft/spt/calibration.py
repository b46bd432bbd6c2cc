"""What is learnt from a calibration batch: initial codebooks, blocks of neurons and routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepeft.errors import first_line
from sparsepeft.layers.router import (
    InitialRouter,
    activity,
    compensated,
    deciding_weight,
    inner_states,
    start_from_outputs,
    start_from_weights,
)
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.logits import deferred_logits
from sparsepeft.models.modes import in_mode
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.ops.routed_ffn.clustering import clustered_order
from sparsepeft.spt.attention import NAME, AttentionCall, implementations, recording, set_implementations
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import ATTENTION_OVERRIDES, FFN_OVERRIDES, SptConfig
from sparsepeft.spt.projections import inner_tensors
from sparsepeft.spt.reconstruction import reconstruct
from sparsepeft.spt.report import watching


@torch.no_grad()
def attend_densely(model: PreTrainedModel, config: SptConfig, batch: dict[str, Tensor]) -> dict[str, AttentionCall]:
    """Run the dense model; the arguments of each self-attention that is to become sparse, by its name."""
    before = implementations(model)
    if config.attention:
        model.set_attn_implementation(NAME)
    try:
        # Logits of a large vocabulary would be most of the memory.
        with recording() as calls, deferred_logits(model, always=True), in_mode(model, training=False):
            model(**batch)
    except (IndexError, TypeError, RuntimeError) as error:  # such as more positions than the model has
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be run on calibration_data ({first_line(error)}); pass a batch as in "
            "training."
        ) from error
    finally:
        set_implementations(before)
    if not config.attention:
        return {}
    names = {module: name for name, module in model.named_modules()}
    attended = {names[module]: call for module, call in calls.items() if _is_self_attention(module, names[module])}
    if not attended:
        raise ValueError(
            f"{type(model).__name__} does not attend through transformers' attention interface and with its masks, so "
            "its attention cannot be made sparse; convert it with SptConfig(attention=False)."
        )
    if config.layers_to_transform is None:
        return attended
    layers = tuple(f"{block.name}." for block in find_blocks(model, layers_to_transform=config.layers_to_transform))
    return {name: call for name, call in attended.items() if name.startswith(layers)}


def _is_self_attention(module: nn.Module, name: str) -> bool:
    words = f"{type(module).__name__}.{name}".lower()
    return not (getattr(module, "is_cross_attention", False) or "cross" in words or "encoder_attn" in words)


def layer_codebooks(name: str, call: AttentionCall, config: SptConfig) -> Codebooks:
    """Codebooks for the attention module ``name``."""
    size = call.query.shape[-1]
    if size % config.subvector_dim:
        raise ValueError(
            f"{name} has heads of {size} channels, which subvector_dim={config.subvector_dim} does not divide; choose "
            "a divisor."
        )
    if not (call.query.isfinite().all() and call.key.isfinite().all()):
        raise ValueError(
            f"Queries or keys of {name} are NaN or infinite on the calibration data; check data, weights and dtype."
        )
    return Codebooks.fit(call.query, call.key, call.mask, config)


def initial_router(
    feed_forward: FeedForward,
    config: SptConfig,
    batch: dict[str, Tensor] | None,
    seen: dict[str, tuple[Tensor, Tensor]],
) -> InitialRouter | None:
    """How the neurons are cut into blocks, and where the router starts: from a calibration batch where there is one.

    None for an FFN with exact values, which has no router.
    """
    if config.values == "exact":
        return None
    inner, num_blocks = feed_forward.sizes[1], config.num_blocks
    inputs = None if batch is None else _inputs(feed_forward, batch, seen)
    states = None if inputs is None else inner_states(feed_forward, inputs)
    if config.block_assignment == "contiguous":
        order = torch.arange(inner, device=deciding_weight(feed_forward).device)
    else:
        features = deciding_weight(feed_forward) if states is None else activity(feed_forward, states, config.seed)
        order = clustered_order(features, num_blocks, config.seed)
    if inputs is None or states is None:
        return start_from_weights(feed_forward, order, num_blocks)
    start = start_from_outputs(feed_forward, order, num_blocks, inputs, states)
    if config.num_active_blocks == num_blocks:
        return start
    if config.compensation_rank:
        active = int(config.num_active_blocks)
        start = compensated(feed_forward, start, active, config.compensation_rank, inputs, states)
    if config.reconstruction_rank and config.reconstruction_steps:
        start = reconstruct(feed_forward, start, config, inputs, states)
    return start


def _inputs(feed_forward: FeedForward, batch: dict[str, Tensor], seen: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """What went into an FFN, without padding: (N, D)."""
    inputs = seen[feed_forward.name][0].flatten(0, -2)
    mask = batch.get("decoder_attention_mask" if feed_forward.is_decoder else "attention_mask")
    return inputs[mask.flatten().bool()] if mask is not None and mask.numel() == len(inputs) else inputs


class Calibration:
    """What a model does on a calibration batch, and the sparse parts that are made from that; each is made once.

    Args:
        model: the dense model.
        config: what becomes sparse.
        batch: see :func:`sparsepeft.planning.batches.read_batch`; None where nothing is to be learnt from one.

    Attributes:
        feed_forwards: those that may become sparse, by name.
        calls: how the attention that may become sparse was called, by name.
        seen: each FFN's input and output, by name.

    Raises:
        ValueError: the model lacks a structure that is needed, sizes do not fit, or the data is unusable.
    """

    def __init__(self, model: PreTrainedModel, config: SptConfig, batch: dict[str, Tensor] | None) -> None:
        self.batch = batch
        self.feed_forwards = {
            each.name: each for each in (find_feed_forwards(model, config.layers_to_transform) if config.ffn else [])
        }
        for name, feed_forward in self.feed_forwards.items():
            if (own := config.of(name)) is not None:
                check_blocks(feed_forward, own)
        with watching(list(self.feed_forwards.values())) as self.seen:
            self.calls = attend_densely(model, config, batch) if batch is not None else {}
        names = {**self.calls, **self.feed_forwards}.keys()
        for name, settings in (config.overrides or {}).items():
            if name not in names:
                raise ValueError(
                    f"overrides has settings for {name!r}, but what becomes sparse is {', '.join(names)}; use one of "
                    "these names."
                )
            kind, other = ("attention", FFN_OVERRIDES) if name in self.calls else ("an FFN", ATTENTION_OVERRIDES)
            if wrong := [key for key in settings if key in other]:
                raise ValueError(
                    f"overrides of {name} has {wrong[0]!r}, but {name} is {kind}, which has no such setting; leave it "
                    "out."
                )
        if config.budget is not None and config.overrides and (missing := sorted(names - config.overrides.keys())):
            raise ValueError(
                f"overrides was passed with a budget, but leaves out {missing[0]}; leave overrides out for a budget to "
                "choose all settings, or pass a whole plan's."
            )
        self._made: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """The most keys that attention which may become sparse had: of an encoder and a decoder, the longer one's."""
        return max(call.key.shape[2] for call in self.calls.values())

    def codebooks(self, config: SptConfig, only: str | None = None) -> dict[str, Codebooks]:
        """Of all attention that becomes sparse by ``config``, or of the one of that name, by name."""
        return {
            name: self._once(f"{name} {own.granularity}", partial(layer_codebooks, name, self.calls[name], own))
            for name, own in self._settings(self.calls, config, only)
        }

    def starts(self, config: SptConfig, only: str | None = None) -> list[tuple[FeedForward, InitialRouter | None]]:
        """Of all FFNs that become sparse by ``config``, or of the one of that name."""
        return [
            (each, self._once(f"{name} {own}", partial(initial_router, each, own, self.batch, self.seen)))
            for name, own in self._settings(self.feed_forwards, config, only)
            for each in (self.feed_forwards[name],)
        ]

    @staticmethod
    def _settings(names: Iterable[str], config: SptConfig, only: str | None) -> Iterator[tuple[str, SptConfig]]:
        for name in names if only is None else (only,):
            if (own := config.of(name)) is not None:
                yield name, own

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def check_blocks(feed_forward: FeedForward, config: SptConfig) -> None:
    """Refuse an FFN whose neurons cannot be cut into the blocks, or not be put in another order.

    Raises:
        ValueError: it is one.
    """
    for name in feed_forward.projection_names:  # raises where they cannot be reordered
        list(inner_tensors(feed_forward.part(name), name, name != feed_forward.names.down))
    inner = feed_forward.sizes[1]
    if inner % config.num_blocks:
        divisors = ", ".join(str(n) for n in range(1, 65) if inner % n == 0)
        raise ValueError(
            f"{feed_forward.name} has {inner} neurons, which num_blocks={config.num_blocks} does not divide; choose "
            f"one of {divisors}."
        )
