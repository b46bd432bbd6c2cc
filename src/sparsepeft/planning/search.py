"""Choosing what each module of a model becomes, by what that does to the loss and to the time of a training step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepeft.models.modes import in_mode
from sparsepeft.ops.measured import alternately
from sparsepeft.planning.plan import DENSE, Choice, Plan, fastest
from sparsepeft.planning.scoring import LossMeter, Text, without_cache

logger = logging.getLogger(__name__)

_WORTH = 0.97  # of the time that a milder choice takes: what is no faster is not measured
_ROUNDS = 5

Settings = dict[str, Any]
Install = Callable[[Mapping[str, Settings]], AbstractContextManager[None]]


class Candidate(NamedTuple):
    """A module that may become sparse.

    Attributes:
        families: settings that it may get, in each family from the mildest.
        lossless: those that leave its output as it is.
        shape: its kind and sizes; modules of one shape take the same time.
        functions: given some settings, the dense module and what it becomes with each of them, inside the context.
        inputs: of these functions.
    """

    families: Sequence[Sequence[Settings]]
    lossless: Sequence[Settings]
    shape: tuple[Any, ...]
    functions: Callable[[Sequence[Settings]], AbstractContextManager[Sequence[Callable[..., Tensor]]]]
    inputs: Sequence[Tensor]


def keep_to_budget(
    model: PreTrainedModel,
    budget: float,
    modules: Mapping[str, Candidate],
    install: Install,
    texts: Mapping[str, Text],
    measured_on: Text,
) -> Plan:
    """Choose the fastest plan by which a model's perplexity stays within a budget on all texts.

    Each choice is measured in one module at a time, and losses are taken to add up. The plan that follows is measured
    as a whole. As long as it exceeds the budget on a text, what it costs beyond what was predicted is shared among its
    choices, all choices cost that much more, and the next plan is made.

    Args:
        model: dense.
        budget: how much higher the perplexity may become, as a share.
        modules: what may become sparse, by name.
        install: makes the model sparse inside a context, by the settings of some modules; the others stay dense.
        texts: what the plan is measured on, by name.
        measured_on: what single choices, and whole steps, are measured on.
    """
    limit = math.log1p(budget)
    with _frozen(model):
        options = _measure(model, modules, install, measured_on, limit)
        meters = {name: LossMeter(model, text, resumable=False) for name, text in texts.items()}
        surcharge, num_tried = 0.0, 0
        while True:
            chosen, num_tried = fastest(options, limit, surcharge), num_tried + 1
            losses, worst = {name: meter.initial for name, meter in meters.items()}, -math.inf
            with install(_sparse(chosen)):
                for name, meter in meters.items():
                    losses[name] = meter.loss()
                    change = losses[name] - meter.initial
                    worst = math.inf if math.isnan(change) else max(worst, change)
                    if worst > limit:  # what the other texts say changes nothing
                        break
            spent = sum(choice.cost(surcharge) for choice in chosen.values())
            logger.info("plan %d: predicted %+.4f, measured %+.4f of %.4f nats", num_tried, spent, worst, limit)
            num_lossy = sum(choice.loss_change != 0 for choice in chosen.values())
            if worst <= limit or not num_lossy:
                break
            # Single changes are small beside their noise, and those that lower the loss by chance get picked.
            surcharge += (worst - spent) / num_lossy
        step_ms = _step_times(model, partial(install, _sparse(chosen)), measured_on)
        if _sparse(chosen) and step_ms["sparse"] >= step_ms["dense"]:
            logger.warning("The plan keeps to the budget, but saves no time, so all modules stay dense.")
            chosen = {name: choices[0] for name, choices in options.items()}
            losses = {name: meter.initial for name, meter in meters.items()}
        if not _sparse(chosen):
            step_ms["sparse"] = step_ms["dense"]  # the same model, whatever disturbed the measurement
    perplexity = {
        name: {"dense": math.exp(meter.initial), "sparse": math.exp(losses[name])} for name, meter in meters.items()
    }
    num_rows, length = measured_on.labels.shape
    return Plan(budget, chosen, perplexity, step_ms, (num_rows, length), num_tried)


def _sparse(chosen: Mapping[str, Choice]) -> dict[str, Settings]:
    return {name: choice.settings for name, choice in chosen.items() if choice.settings != DENSE}


def _measure(
    model: PreTrainedModel, modules: Mapping[str, Candidate], install: Install, text: Text, limit: float
) -> dict[str, list[Choice]]:
    """What may become of each module, dense first: the time of each shape once, then the loss in each module."""
    timed: dict[tuple[Any, ...], list[list[Choice]]] = {}
    for module in modules.values():
        if module.shape not in timed:
            timed[module.shape] = _worthwhile(module)
    options: dict[str, list[Choice]] = {}
    meter = LossMeter(model, text)
    num_beyond: dict[str, int] = {}  # the limit, by a choice alone
    for name in sorted(modules, key=partial(_from_the_middle, modules)):
        families = timed[modules[name].shape]
        dense_ms = max((choice.dense_ms for family in families for choice in family), default=0.0)
        options[name] = [Choice(DENSE, 0.0, dense_ms, dense_ms)]
        for choice in (choice for family in families for choice in family):
            beyond = f"{modules[name].shape} {choice.settings}"
            if num_beyond.get(beyond, 0) < 2:
                if choice.settings not in modules[name].lossless:
                    with install({name: choice.settings}):
                        choice = replace(choice, loss_change=meter.loss(name) - meter.initial)
                logger.info("%s: %s", name, choice)
                options[name].append(choice)
                num_beyond[beyond] = num_beyond.get(beyond, 0) + (not choice.loss_change <= limit)  # NaN is beyond, too
    return {name: options[name] for name in modules}


def _worthwhile(module: Candidate) -> list[list[Choice]]:
    """Those of each family, from the mildest, that are faster than the dense module and than all that are milder."""
    with module.functions([settings for family in module.families for settings in family]) as functions:
        dense, *others = _alternately(functions, module.inputs)
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


def _alternately(functions: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor]) -> list[list[float]]:
    """Milliseconds of forward and backward of functions of the same inputs, in each of some rounds."""
    leaves = [each.detach().requires_grad_() for each in inputs]

    def run(function: Callable[..., Tensor]) -> None:
        with torch.enable_grad():
            output = function(*leaves)
            output.backward(torch.ones_like(output))
        _wait_for(output.device)

    forms = {str(index): partial(run, function) for index, function in enumerate(functions)}
    return list(alternately(forms, _ROUNDS).values())


def _step_times(
    model: PreTrainedModel, install: Callable[[], AbstractContextManager[None]], text: Text
) -> dict[str, float]:
    """Milliseconds of forward and backward through the layers, dense and by a plan."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    with in_mode(model, training=True):
        for _ in range(_ROUNDS):
            times["dense"] += alternately({"": partial(_step, model, text.batch)}, 1)[""]
            with install():
                times["sparse"] += alternately({"": partial(_step, model, text.batch)}, 1)[""]
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


def _from_the_middle(modules: Mapping[str, Candidate], name: str) -> int:
    """The middle layers first: what they cannot bear, hardly any can."""
    alike = [other for other, module in modules.items() if module.shape[0] == modules[name].shape[0]]
    return abs(2 * alike.index(name) - len(alike) + 1)
