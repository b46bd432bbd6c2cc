"""What is learnt from a calibration batch: initial codebooks, blocks of neurons and routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepeft.errors import first_line
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.ops.routed_ffn.clustering import clustered_order
from sparsepeft.planning import Text, text_for
from sparsepeft.spt.attention import NAME, AttentionCall, recording
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.projections import inner_tensors
from sparsepeft.spt.reconstruction import reconstruct
from sparsepeft.spt.report import watching
from sparsepeft.spt.router import (
    InitialRouter,
    activity,
    compensated,
    deciding_weight,
    inner_states,
    start_from_outputs,
    start_from_weights,
)


def calibration_batch(model: PreTrainedModel, data: Any) -> dict[str, Tensor]:
    """The calibration data as keyword arguments on the model's device: (B, T, ...) each, without labels.

    Raises:
        ValueError: it is no batch that the model could take.
    """
    if not isinstance(data, (Mapping, Tensor, str, list, tuple, np.ndarray)):
        raise ValueError(
            f"calibration_data is {data!r:.80} ({type(data).__name__}); expected token ids (B, T), as a tensor or "
            "lists, or the mapping that the model takes."
        )
    batch = data if isinstance(data, Mapping) else {"input_ids": data}
    batch = {
        name: _ids(value) if isinstance(value, (str, list, tuple, np.ndarray)) else value
        for name, value in batch.items()
        if name != "labels"
    }
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if all(value.dim() == 1 for value in tensors.values()):  # one sequence
        tensors = {name: value[None] for name, value in tensors.items()}
    if not tensors or any(value.numel() == 0 for value in tensors.values()):
        raise ValueError("calibration_data is empty; pass at least one sequence, for example input ids (B, T).")
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"calibration_data has NaN or infinite values in {name}; pass clean data.")
        if value.dim() < 2:
            raise ValueError(f"calibration_data has {name} of shape {tuple(value.shape)}; expected (B, T, ...).")
        if name.endswith("input_ids"):
            _check_ids(name, value, model)
        if name.endswith("attention_mask") and value.dim() == 2 and not value.any():
            raise ValueError(
                f"calibration_data has 0 everywhere in {name}, as if all tokens were padding; pass the tokenizer's."
            )
    return {name: value.to(model.device) for name, value in tensors.items()}


def read_text(model: PreTrainedModel, data: Any) -> Text:
    """The calibration data as what a language model is scored on.

    Raises:
        ValueError: the model is no language model, or the data not what it could be scored on.
    """
    batch = calibration_batch(model, data)
    labels = data.get("labels") if isinstance(data, Mapping) else None
    labels = _ids(labels) if isinstance(labels, (list, tuple, np.ndarray)) else labels
    if "input_ids" not in batch:
        raise ValueError(f"A budget is measured on token ids, but the data has {', '.join(batch)}; pass input_ids.")
    shape = batch["input_ids"].shape
    if labels is not None and labels.numel() != shape.numel():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} were passed with input_ids of shape {tuple(shape)}; a budget needs "
            "a language model's, one for each token."
        )
    return text_for(model, batch, labels if labels is None else labels.view(shape))


def _check_ids(name: str, ids: Tensor, model: PreTrainedModel) -> None:
    """Refuse ids without an embedding; on an accelerator the failed lookup would make the device unusable."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"calibration_data has {name} of shape {tuple(ids.shape)} and {ids.dtype}; expected whole numbers (B, T)."
        )
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    least, most = (int(bound) for bound in ids.aminmax())
    worst = least if least < 0 else most
    if name == "input_ids" and size is not None and not 0 <= worst < size:
        raise ValueError(
            f"calibration_data has the token id {worst}, but {type(model).__name__} knows 0 to {size - 1}; pass what "
            "its own tokenizer gives."
        )


def _ids(data: Any) -> Tensor:
    """Lists of token ids as a tensor (B, T), or (T,) from a single list."""
    if isinstance(data, str) or (len(data) and isinstance(data[0], str)):
        raise ValueError(
            "calibration_data holds texts, but a model is run on token ids; pass "
            "tokenizer(texts, padding=True, return_tensors='pt')."
        )
    rows = [row for row in data if isinstance(row, (list, tuple, np.ndarray, Tensor))]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"calibration_data has sequences of {lengths[0]} to {lengths[-1]} token ids; pad or cut them to one length."
        )
    try:
        return torch.stack([torch.as_tensor(row) for row in data]) if rows else torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"calibration_data is {data!r:.80}; expected token ids (B, T).") from error


@torch.no_grad()
def attend_densely(model: PreTrainedModel, config: SptConfig, batch: dict[str, Tensor]) -> dict[str, AttentionCall]:
    """Run the dense model; the arguments of each self-attention that is to become sparse, by its name."""
    before, training = model.config._attn_implementation, model.training
    if config.attention:
        model.set_attn_implementation(NAME)
    model.eval()
    try:
        with recording() as calls:
            model(**batch)
    except (IndexError, TypeError, RuntimeError) as error:  # such as more positions than the model has
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be run on calibration_data ({first_line(error)}); pass a batch as in "
            "training."
        ) from error
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    if not config.attention:
        return {}
    names = {module: name for name, module in model.named_modules()}
    attended = {names[module]: call for module, call in calls.items() if _is_self_attention(module, names[module])}
    if not attended:
        raise ValueError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its attention "
            "cannot be made sparse; convert it with SptConfig(attention=False)."
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
        config: with ``top_l`` as a count.
        batch: see :func:`calibration_batch`; None where nothing is to be learnt from one.

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
        for name in config.overrides or {}:
            if name not in names:
                raise ValueError(
                    f"overrides has settings for {name!r}, but what becomes sparse is {', '.join(names)}; use one of "
                    "these names."
                )
        if config.budget is not None and config.overrides and (missing := sorted(names - config.overrides.keys())):
            raise ValueError(
                f"overrides was passed with a budget, but leaves out {missing[0]}; leave overrides out for a budget to "
                "choose all settings, or pass a whole plan's."
            )
        self._made: dict[str, Any] = {}

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
