"""Making a model sparse, in place: what is learnt from a calibration batch, and how well it fits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.spt.calibration import attend_densely, calibration_batch, initial_router, layer_codebooks
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import check_bare, install, sparsification
from sparsepeft.spt.feed_forward import inner_tensors
from sparsepeft.spt.report import report_attention, report_feed_forwards, watching


def sparsify(model: PreTrainedModel, config: SptConfig, calibration_data: Any = None) -> PreTrainedModel:
    """Make a model's self-attention and FFNs sparse, in place; PEFT methods go on top afterwards.

    Args:
        model: a transformers model, not yet wrapped by PEFT.
        config: what becomes sparse.
        calibration_data: a typical batch: input ids (B, T), or (T,) for one sequence, as a tensor or lists, or the
            mapping that the model takes.
            Codebooks are made from its queries and keys, and a fraction ``top_l`` is of its length T. Not needed
            without ``attention``.

    Returns:
        ``model``; ``model.sparsification.report`` says how much it changed.

    Raises:
        TypeError: ``model`` is no bare transformers model, or ``config`` no :class:`SptConfig`.
        ValueError: the model lacks a structure that is needed, sizes do not fit, or the calibration data is unusable.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft import SptConfig
        >>> model = AutoModelForCausalLM.from_pretrained("MODEL")
        >>> ids = torch.randint(5, 90, (2, 32))  # of typical text
        >>> model = sparsify(model, SptConfig(top_l=8, num_blocks=4, num_active_blocks=2), calibration_data=ids)
        >>> model.sparsification.config.top_l
        8
    """
    check_bare("sparsify", model)
    if not isinstance(config, SptConfig):
        raise TypeError(f"sparsify got a {type(config).__name__} as its config; expected an SptConfig.")
    if sparsification(model) is not None:
        raise ValueError("The model is sparse already; call desparsify first to convert it with other settings.")
    batch = None if calibration_data is None else calibration_batch(model, calibration_data)
    if config.attention:
        if batch is None:
            raise ValueError("Sparse attention needs calibration_data for its codebooks; pass a batch of input ids.")
        config = config.with_length(next(iter(batch.values())).shape[1])
    if config.ffn and config.compensation_rank and batch is None:
        raise ValueError(
            f"compensation_rank={config.compensation_rank} needs calibration_data to be fitted to; pass a batch of "
            "input ids, or compensation_rank=0."
        )
    # All that can go wrong does so before the model is touched.
    feed_forwards = find_feed_forwards(model, config.layers_to_transform) if config.ffn else []
    for feed_forward in feed_forwards:
        if (own := config.of(feed_forward.name)) is not None:
            _check_blocks(feed_forward, own)
    with watching(feed_forwards) as seen:
        calls = attend_densely(model, config, batch) if batch is not None else {}
    _check_names(config, [*calls, *(each.name for each in feed_forwards)])
    starts = [
        (feed_forward, initial_router(feed_forward, own, batch, seen))
        for feed_forward in feed_forwards
        if (own := config.of(feed_forward.name)) is not None
    ]
    codebooks = {
        name: layer_codebooks(name, call, own) for name, call in calls.items() if (own := config.of(name)) is not None
    }

    state = install(model, config, codebooks, starts)
    for name, layer in state.attention.items():
        report_attention(state.report, name, layer, calls[name])
    if batch is not None:
        report_feed_forwards(state.report, state.feed_forwards, seen)
    return model


def _check_blocks(feed_forward: FeedForward, config: SptConfig) -> None:
    for name in feed_forward.projection_names:  # raises where they cannot be reordered
        list(inner_tensors(feed_forward.part(name), name, name != feed_forward.names.down))
    inner = feed_forward.sizes[1]
    if inner % config.num_blocks:
        divisors = ", ".join(str(n) for n in range(1, 65) if inner % n == 0)
        raise ValueError(
            f"{feed_forward.name} has {inner} neurons, which num_blocks={config.num_blocks} does not divide; choose "
            f"one of {divisors}."
        )


def _check_names(config: SptConfig, names: Collection[str]) -> None:
    for name in config.overrides or {}:
        if name not in names:
            raise ValueError(
                f"overrides has settings for {name!r}, but what becomes sparse is {', '.join(names)}; use one of these "
                "names."
            )
