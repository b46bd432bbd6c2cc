"""What the modules of a model may become within a budget of perplexity: the choices, and how they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsepeft.models.masks import dense_mask, is_whole
from sparsepeft.models.sublayers import FeedForward, compute_feed_forward
from sparsepeft.planning import DENSE, Candidate, Plan, Settings, Text, keep_to_budget
from sparsepeft.spt.attention import AttentionCall, SparseAttention
from sparsepeft.spt.calibration import Calibration
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import desparsify, install
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import make_sparse

_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the keys, from the mildest
_ROUTED = ((8, 6), (8, 4))  # blocks, and those that are used
_RANK = 64  # of the linear map beside a routed FFN
_TOKENS = 1024  # that a choice is measured on


def plan_within_budget(
    model: PreTrainedModel, config: SptConfig, calibration: Calibration, texts: Mapping[str, Text]
) -> Plan:
    """Choose what each module becomes, such that the model's perplexity stays within ``config.budget`` on all texts.

    Attention may keep a half to a sixteenth of the keys, by token or by block; an FFN may have exact values, or routed
    ones with a linear map; and each may stay dense.

    Args:
        model: dense.
        config: with a budget, before ``top_l`` and block size are counts.
        calibration: of the model.
        texts: what the plan has to keep to the budget on, by name; choices are measured on the one called
            ``"calibration"``.
    """
    # Neither what is dense for a while nor what a refresh takes has to do with what a module is worth.
    plain = replace(config, infer="sparse", dense_steps=0, dense_labels=False, codebook_interval=0)
    measured_on = texts["calibration"].at_most(_TOKENS)
    num_rows, length = measured_on.labels.shape
    modules = {name: _attention(plain, calibration, name, num_rows) for name in calibration.calls}
    plain = plain.with_length(length)
    modules |= {name: _feed_forward(plain, calibration, name, num_rows) for name in calibration.feed_forwards}

    @contextmanager
    def installed(settings: Mapping[str, Settings]) -> Iterator[None]:
        own = replace(plain, overrides=dict.fromkeys(modules, DENSE) | dict(settings))
        install(model, own, calibration.codebooks(own), calibration.starts(own))
        try:
            yield
        finally:
            desparsify(model)

    return keep_to_budget(model, float(config.budget or 0.0), modules, installed, texts, measured_on)


def _attention(config: SptConfig, calibration: Calibration, name: str, num_rows: int) -> Candidate:
    call = calibration.calls[name].first(num_rows)
    mask, length = call.mask, call.key.shape[2]
    families: list[list[Settings]] = [[], []]
    for count in dict.fromkeys(max(1, round(length * share)) for share in _SHARES):
        block_size = int(replace(config, top_l=count).with_length(length).block_size or 0)
        if count < length:
            families[0].append({"granularity": "token", "top_l": count})
        if 2 * block_size <= count < length:
            families[1].append({"granularity": "block", "block_size": block_size, "top_l": count})
    config = config.with_length(length)
    window = None if mask.window is None or mask.window >= length else mask.window
    shape = ("attention", *call.query.shape, *call.key.shape, mask.causal, window)
    functions = partial(_attention_functions, config, calibration, name, call)
    return Candidate(families, (), shape, functions, call[:3])


@contextmanager
def _attention_functions(
    config: SptConfig, calibration: Calibration, name: str, call: AttentionCall, settings: Sequence[Settings]
) -> Iterator[list[Callable[..., Tensor]]]:
    mask, scale = call.mask, call.query.shape[-1] ** -0.5
    module: Any = nn.Module()
    module.num_key_value_groups = call.query.shape[1] // call.key.shape[1]

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = is_whole(mask)
        allowed = None if whole else dense_mask(mask)
        flags = {"scaling": scale, "is_causal": whole and mask.causal}
        attended: Tensor = sdpa_attention_forward(module, query, key, value, allowed, **flags)[0]
        return attended

    functions: list[Callable[..., Tensor]] = [dense]
    for each in settings:
        own = replace(config, **each)
        (books,) = calibration.codebooks(own, name).values()
        functions.append(partial(SparseAttention(books, own, SparseContext(own)).train(), mask=mask, scale=scale))
    yield functions


def _feed_forward(config: SptConfig, calibration: Calibration, name: str, num_rows: int) -> Candidate:
    feed_forward = calibration.feed_forwards[name]
    hidden, inner = feed_forward.sizes
    exact = {
        "values": "exact",
        "num_blocks": config.num_blocks,
        "num_active_blocks": config.num_active_blocks,
        "compensation_rank": 0,
    }
    routed = [
        {
            "values": "routed",
            "num_blocks": blocks,
            "num_active_blocks": active,
            "compensation_rank": config.compensation_rank or min(_RANK, hidden),
        }
        for blocks, active in _ROUTED
        if inner % blocks == 0
    ]
    functions = partial(_feed_forward_functions, config, calibration, feed_forward)
    inputs = [calibration.seen[name][0][:num_rows]]
    return Candidate([[exact], routed], [exact], ("ffn", hidden, inner, feed_forward.names), functions, inputs)


@contextmanager
def _feed_forward_functions(
    config: SptConfig, calibration: Calibration, feed_forward: FeedForward, settings: Sequence[Settings]
) -> Iterator[list[Callable[..., Tensor]]]:
    dense = partial(compute_feed_forward, feed_forward.owner, feed_forward.names, feed_forward.activation)
    configs = [replace(config, **each) for each in settings]
    starts = [start for own in configs for _, start in calibration.starts(own, feed_forward.name)]  # of its dense form
    layers = []
    try:
        # They share the weights, and each puts these into its own order: that matters for what is computed alone.
        for own, start in zip(configs, starts, strict=True):
            layers.append(make_sparse(feed_forward, start, own, SparseContext(own)).train())
        yield [dense, *layers]
    finally:
        for layer in reversed(layers):
            layer.release()
