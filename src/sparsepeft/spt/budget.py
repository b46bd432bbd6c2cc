"""Choosing what each module of a model becomes, by what that does to the loss and to the time of a training step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsepeft.models.masks import dense_mask, is_whole
from sparsepeft.models.scoring import LossMeter, Text, without_cache
from sparsepeft.models.sublayers import FeedForward
from sparsepeft.ops.measured import alternately
from sparsepeft.spt.attention import AttentionCall, SparseAttention
from sparsepeft.spt.calibration import Calibration
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import desparsify, install
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import make_sparse
from sparsepeft.spt.plan import DENSE, Choice, Plan, fastest

logger = logging.getLogger(__name__)

_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the keys, from the mildest
_ROUTED = ((8, 6), (8, 4))  # blocks, and those that are used
_RANK = 64  # of the linear map beside a routed FFN
_TOKENS = 1024  # that a choice is measured on
_WORTH = 0.97  # of the time that a milder choice takes: what is no faster is not measured
_ROUNDS = 5
_SHRINK = 0.95


class _Module(NamedTuple):
    """A module that may become sparse.

    Attributes:
        families: settings that it may get, in each family from the mildest.
        shape: its kind and sizes; modules of one shape take the same time.
        time: milliseconds, in each of some rounds, of the dense module and of what it becomes with some settings.
    """

    families: list[list[dict[str, Any]]]
    shape: tuple[Any, ...]
    time: Callable[[list[SptConfig]], list[list[float]]]


def keep_to_budget(
    model: PreTrainedModel, config: SptConfig, calibration: Calibration, texts: Mapping[str, Text]
) -> tuple[SptConfig, Plan]:
    """Choose the fastest plan by which the model's perplexity stays within the budget on all texts.

    Each choice is measured in one layer at a time, and losses are taken to add up. The plan that follows is measured
    as a whole; as long as it exceeds the budget, a smaller one is spent.

    Args:
        model: dense.
        config: with a budget.
        calibration: of the model.
        texts: ``"calibration"``, which choices are measured on, and others that the plan is measured on.

    Returns:
        The config, with the plan as its ``overrides``, and the plan.
    """
    budget = float(config.budget or 0.0)
    limit = math.log1p(budget)
    plain = replace(config, infer="sparse", dense_steps=0, dense_labels=False, codebook_interval=0)
    few = texts["calibration"].at_most(_TOKENS)
    with _frozen(model):
        options = _measure(model, plain, calibration, few, limit)
        meters = {name: LossMeter(model, text, resumable=False) for name, text in texts.items()}
        allowance, num_tried = limit, 0
        while True:
            chosen, num_tried = fastest(options, allowance), num_tried + 1
            planned = replace(plain, overrides={name: choice.settings for name, choice in chosen.items()})
            with _installed(model, planned, calibration):
                losses = {name: meter.loss() for name, meter in meters.items()}
            spent = sum(max(choice.loss_change, 0.0) for choice in chosen.values())
            worst = max(losses[name] - meter.initial for name, meter in meters.items())
            logger.info("plan %d: predicted %+.4f, measured %+.4f of %.4f nats", num_tried, spent, worst, limit)
            if worst <= limit or spent == 0:
                break
            allowance = spent * min(_SHRINK, limit / worst)
        step_ms = _step_times(model, planned, calibration, few)
    plan = Plan(
        budget=budget,
        modules=chosen,
        perplexity={
            name: {"dense": math.exp(meter.initial), "sparse": math.exp(losses[name])} for name, meter in meters.items()
        },
        step_ms=step_ms,
        step_shape=(few.labels.shape[0], few.labels.shape[1]),
        num_tried=num_tried,
    )
    return replace(config, overrides=planned.overrides), plan


def _measure(
    model: PreTrainedModel, config: SptConfig, calibration: Calibration, text: Text, limit: float
) -> dict[str, list[Choice]]:
    """What may become of each module, dense first: the time of each shape once, then the loss in each module."""
    modules = _modules(config, calibration, len(text.labels))
    timed: dict[tuple[Any, ...], list[list[Choice]]] = {}
    for module in modules.values():
        if module.shape not in timed:
            timed[module.shape] = _worthwhile(config, module)
    options: dict[str, list[Choice]] = {}
    meter = LossMeter(model, text)
    hopeless: dict[str, int] = {}
    for name in sorted(modules, key=partial(_from_the_middle, modules)):
        options[name] = [Choice(DENSE, 0.0, 0.0, 0.0)]
        for family in timed[modules[name].shape]:
            for choice in family:
                key = f"{modules[name].shape} {choice.settings}"
                if hopeless.get(key, 0) >= 2:
                    break
                own = replace(config, overrides={n: DENSE for n in modules if n != name} | {name: choice.settings})
                if choice.settings.get("values") != "exact":  # which leaves every output as it is
                    with _installed(model, own, calibration):
                        choice = replace(choice, loss_change=meter.loss(name) - meter.initial)
                logger.info("%s %s: %+.5f nats, %s", name, choice.settings, choice.loss_change, choice)
                options[name].append(choice)
                if choice.loss_change > limit:
                    hopeless[key] = hopeless.get(key, 0) + 1
                    break
        dense_ms = max((choice.dense_ms for choice in options[name]), default=0.0)
        options[name][0] = Choice(DENSE, 0.0, dense_ms, dense_ms)
    return {name: options[name] for name in modules}


def _modules(config: SptConfig, calibration: Calibration, num_rows: int) -> dict[str, _Module]:
    """All that may become sparse, by name."""
    found = {}
    for name, call in calibration.calls.items():
        query, key, value, mask = call
        mask = mask._replace(key_mask=mask.key_mask[:num_rows])
        few = AttentionCall(query[:num_rows], key[:num_rows], value[:num_rows], mask)
        keys = few.key.shape[2]
        counts = list(dict.fromkeys(max(1, round(keys * share)) for share in _SHARES))
        families = [
            [{"granularity": "token", "top_l": count} for count in counts if count < keys],
            [
                {"granularity": "block", "block_size": config.block_size, "top_l": count}
                for count in counts
                if 2 * config.block_size <= count < keys
            ],
        ]
        window = few.mask.window if few.mask.window is not None and few.mask.window < keys else None
        shape: tuple[Any, ...] = ("attention", few.query.shape, few.key.shape, few.mask.causal, window)
        found[name] = _Module(families, shape, _attention_timer(name, few, calibration))
    for name, feed_forward in calibration.feed_forwards.items():
        hidden, inner = feed_forward.sizes
        exact = {"num_blocks": config.num_blocks, "num_active_blocks": config.num_active_blocks}
        rank = config.compensation_rank or min(_RANK, hidden)
        families = [
            [{"values": "exact", **exact, "compensation_rank": 0}],
            [
                {"values": "routed", "num_blocks": blocks, "num_active_blocks": active, "compensation_rank": rank}
                for blocks, active in _ROUTED
                if inner % blocks == 0
            ],
        ]
        shape = ("ffn", *feed_forward.sizes, feed_forward.names)
        states = calibration.seen[name][0][:num_rows]
        found[name] = _Module(families, shape, _feed_forward_timer(feed_forward, states, calibration))
    return found


def _worthwhile(config: SptConfig, module: _Module) -> list[list[Choice]]:
    """Those of each family, from the mildest, that are faster than the dense module and than all that are milder."""
    dense, *others = module.time([replace(config, **settings) for family in module.families for settings in family])
    dense_ms, times = median(dense), iter(others)
    worthwhile: list[list[Choice]] = []
    for family in module.families:
        worthwhile.append([])
        least = dense_ms
        for settings in family:
            # The machine may be slower in one round than in another: what counts is the share within a round.
            sparse_ms = dense_ms * median(ms / of for ms, of in zip(next(times), dense, strict=True))
            if sparse_ms < _WORTH * least:
                worthwhile[-1].append(Choice(settings, 0.0, dense_ms, sparse_ms))
                least = sparse_ms
    return worthwhile


def _attention_timer(
    name: str, call: AttentionCall, calibration: Calibration
) -> Callable[[list[SptConfig]], list[list[float]]]:
    query, key, value, mask = call
    scale = query.shape[-1] ** -0.5
    module: Any = nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = is_whole(mask)
        allowed = None if whole else dense_mask(mask)
        flags = {"scaling": scale, "is_causal": whole and mask.causal}
        attended: Tensor = sdpa_attention_forward(module, query, key, value, allowed, **flags)[0]
        return attended

    def time(configs: list[SptConfig]) -> list[list[float]]:
        (books,) = calibration.codebooks(configs[0], name).values()
        layers = [SparseAttention(books, config, SparseContext(config)).train() for config in configs]
        forms: list[Callable[..., Tensor]] = [dense, *(partial(layer, mask=mask, scale=scale) for layer in layers)]
        return _alternately(forms, [query, key, value])

    return time


def _feed_forward_timer(
    feed_forward: FeedForward, states: Tensor, calibration: Calibration
) -> Callable[[list[SptConfig]], list[list[float]]]:
    names = feed_forward.names

    def dense(states: Tensor) -> Tensor:
        inner = feed_forward.activation(feed_forward.part(names.gate or names.up)(states))
        if names.gate is not None:
            inner = inner * feed_forward.part(names.up)(states)
        output: Tensor = feed_forward.part(names.down)(inner)
        return output

    def time(configs: list[SptConfig]) -> list[list[float]]:
        starts = [start for config in configs for _, start in calibration.starts(config, feed_forward.name)]
        # They share the weights, and each puts these into its own order: that matters for what is computed alone.
        layers = [
            make_sparse(feed_forward, start, config, SparseContext(config)).train()
            for start, config in zip(starts, configs, strict=True)
        ]
        try:
            return _alternately([dense, *layers], [states])
        finally:
            for layer in reversed(layers):
                layer.release()

    return time


def _alternately(functions: list[Callable[..., Tensor]], inputs: list[Tensor]) -> list[list[float]]:
    """Milliseconds of forward and backward of functions of the same inputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]

    def run(function: Callable[..., Tensor]) -> None:
        with torch.enable_grad():
            output = function(*leaves)
            output.backward(torch.ones_like(output))
        _wait_for(output.device)

    forms = {str(index): partial(run, function) for index, function in enumerate(functions)}
    return list(alternately(forms, _ROUNDS).values())


def _step_times(model: PreTrainedModel, config: SptConfig, calibration: Calibration, text: Text) -> dict[str, float]:
    """Milliseconds of forward and backward through the layers, dense and by a plan."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    training = model.training
    model.train()
    try:
        for _ in range(_ROUNDS):
            times["dense"] += alternately({"": lambda: _step(model, text.batch)}, 1)[""]
            with _installed(model, config, calibration):
                times["sparse"] += alternately({"": lambda: _step(model, text.batch)}, 1)[""]
    finally:
        model.train(training)
    return {name: median(each) for name, each in times.items()}


def _step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    base = model.base_model

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.enable_grad():
            states = base(**batch, **without_cache(base), return_dict=True).last_hidden_state
            states.backward(torch.ones_like(states))
    finally:
        handle.remove()
    _wait_for(states.device)


@contextmanager
def _installed(model: PreTrainedModel, config: SptConfig, calibration: Calibration) -> Iterator[None]:
    """Inside the context the model is sparse."""
    install(model, config, calibration.codebooks(config), calibration.starts(config))
    try:
        yield
    finally:
        desparsify(model)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the context no weight is trained, as with adapters, and random numbers drawn do not count."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _from_the_middle(modules: Mapping[str, _Module], name: str) -> int:
    """The middle layers first: what they cannot bear, hardly any can."""
    alike = [other for other, module in modules.items() if module.shape[0] == modules[name].shape[0]]
    return abs(2 * alike.index(name) - len(alike) + 1)
