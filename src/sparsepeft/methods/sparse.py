"""What runs that make their model sparse first (SPT) have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.spt import Plan, Sparsification, SptConfig, answering, sparsification, sparsify
from sparsepeft.spt.config import INFER

_MASKED = 0.15
T = TypeVar("T")


def read_spt_settings(values: Any) -> SptConfig:
    """A :class:`sparsepeft.spt.SptConfig` from its keys and values; a budget may be ``"2%"``.

    Raises:
        UserError: an unknown key, or a value that the config refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"spt={values!r} was given; expected a mapping of SptConfig's settings, {{}} for the defaults.")
    values = values | {key: _share(value) for key, value in values.items() if key == "budget"}
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


def check_spt(method: str, values: Any, is_language_model: bool) -> SptConfig:
    """How a run's model is made sparse.

    Raises:
        UserError: settings that cannot be used, a method that has no adapter to save the routers with, or a budget of
            perplexity for a model that has none.
    """
    if method == "full":
        raise UserError(
            "`method=full` was given with `spt`, but a sparse model is saved with its adapter and full fine-tuning has "
            "none; choose another method, such as lora."
        )
    config = read_spt_settings(values)
    if config.budget is not None and config.overrides is None and not is_language_model:
        raise UserError(
            f"`spt` has budget={config.budget}, how much a language model's perplexity may rise, but the task is no "
            "`lm`; leave the budget out, or choose settings of single modules by `overrides`."
        )
    return config


def make_sparse(
    model: PreTrainedModel,
    config: SptConfig,
    calibration_data: Any,
    held_out_data: Any = None,
    plan: Plan | None = None,
) -> Sparsification:
    """:func:`sparsepeft.spt.sparsify`, with what was converted and how far from the dense model it is.

    With a ``plan`` that was made before, no other is.

    Raises:
        UserError: the model lacks a structure that is needed, or sizes do not fit.
    """
    if plan is not None:
        config = dataclasses.replace(config, overrides=plan.overrides)
    try:
        sparse: Any = sparsify(model, config, calibration_data, held_out_data=held_out_data)
    except ValueError as error:
        raise UserError(f"The model cannot be made sparse: {error}") from error
    made: Sparsification = sparse.sparsification
    made.plan = made.plan or plan
    return made


def with_masks(tokenizer: PreTrainedTokenizerBase, blocks: Tensor, seed: int) -> dict[str, Tensor]:
    """Blocks of text (N, T) as a masked language model is scored on them, with 15 % of the tokens to be told.

    Args:
        tokenizer: the model's.
        seed: of which tokens these are.

    Raises:
        UserError: the tokenizer has no token that masks another.
    """
    if tokenizer.mask_token is None:
        raise UserError(
            "A masked language model is scored on tokens that it has to guess, but its tokenizer has no mask token; "
            "set its mask_token and save it with the model, or leave out the budget."
        )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=_MASKED, seed=seed)
    return dict(collator([{"input_ids": block} for block in blocks]))


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
    """A conversion's settings, report and plan, for a result file."""
    plan = sparsification.plan
    return {
        "config": dataclasses.asdict(sparsification.config),
        "report": sparsification.report.to_dict(),
        "plan": None if plan is None else plan.to_dict(),
    }


def count_routers(model: nn.Module) -> int:
    """Trained parameters of a sparse model's routers."""
    named = model.named_parameters()
    return sum(parameter.numel() for name, parameter in named if parameter.requires_grad and "spt_router" in name)


def _share(value: Any) -> Any:
    """``"2%"`` as 0.02; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError as error:
        raise UserError(f"The SPT setting budget={value!r} was given; expected a share, such as 2% or 0.02.") from error


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value (true or false)"
    return "number" if isinstance(value, (int, float)) else "word" if isinstance(value, str) else type(value).__name__
