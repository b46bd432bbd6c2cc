"""What runs that make their model sparse first (SPT) have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.spt import Sparsification, SptConfig, answering, sparsification, sparsify
from sparsepeft.spt.config import INFER

T = TypeVar("T")


def read_spt_settings(values: Any) -> SptConfig:
    """A :class:`sparsepeft.spt.SptConfig` from its keys and values.

    Raises:
        UserError: an unknown key, or a value that the config refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"spt={values!r} was given; expected a mapping of SptConfig's settings, {{}} for the defaults.")
    defaults = {each.name: each.default for each in dataclasses.fields(SptConfig)}
    for key, value in values.items():
        if key not in defaults:
            raise UserError(unknown_name("SPT setting", str(key), defaults))
        if _kind(value) != _kind(defaults[key]) and defaults[key] is not None:
            raise UserError(
                f"The SPT setting {key}={value!r} was given; expected a {_kind(defaults[key])}, as its default "
                f"{defaults[key]!r} is."
            )
    try:
        return SptConfig(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"The SPT settings cannot be used: {error}") from error


def check_spt(method: str, values: Any) -> SptConfig:
    """How a run's model is made sparse.

    Raises:
        UserError: settings that cannot be used, or a method that has no adapter to save the routers with.
    """
    if method == "full":
        raise UserError(
            "`method=full` was given with `spt`, but a sparse model is saved with its adapter and full fine-tuning has "
            "none; choose another method, such as lora."
        )
    return read_spt_settings(values)


def make_sparse(model: PreTrainedModel, config: SptConfig, calibration_data: Any) -> Sparsification:
    """:func:`sparsepeft.spt.sparsify`, with what was converted and how far from the dense model it is.

    Raises:
        UserError: the model lacks a structure that is needed, or sizes do not fit.
    """
    try:
        sparse: Any = sparsify(model, config, calibration_data)
    except ValueError as error:
        raise UserError(f"The model cannot be made sparse: {error}") from error
    return sparse.sparsification


def by_infer(model: nn.Module, score: Callable[[], T]) -> dict[str, T]:
    """What ``score`` returns for each way in which a model can answer, by its name, the model's way first.

    A dense model has one way, as has a sparse one that only trains sparsely (exact FFNs without sparse attention).
    """
    state = sparsification(model)
    if state is None:
        return {"dense": score()}
    scores = {state.context.infer: score()}
    if state.attention or any(routed.config.values == "routed" for _, routed in state.feed_forwards):
        (other,) = set(INFER) - scores.keys()
        with answering(model, other):
            scores[other] = score()
    return scores


def describe(sparsification: Sparsification) -> dict[str, Any]:
    """A conversion's settings and report, for a result file."""
    return {"config": dataclasses.asdict(sparsification.config), "report": sparsification.report.to_dict()}


def count_routers(model: nn.Module) -> int:
    """Trained parameters of a sparse model's routers."""
    named = model.named_parameters()
    return sum(parameter.numel() for name, parameter in named if parameter.requires_grad and "spt_router" in name)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value (true or false)"
    return "number" if isinstance(value, (int, float)) else "word" if isinstance(value, str) else type(value).__name__
