"""Hyperparameters per method: the paper's, and the best known to us.

``paper``: appendix A of arXiv:2211.16634 (learning rates, batch, epochs per task, sizes). ``best``: see
``docs/experiments.md`` for what was tried; LoRA's rank and alpha are PEFT's usual ones in both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sparsepeft.arguments import check_choice, check_number
from sparsepeft.errors import UserError, unknown_name

METHODS = ("spartan", "pfeiffer", "houlsby", "lora", "ia3", "bitfit", "head", "full")
RECIPES = ("best", "paper")
# Those of transformers that need no further arguments.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
)


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Args:
        learning_rate: peak learning rate of AdamW.
        head_learning_rate: the same of the task's head; None takes that of the rest.
        norms_learning_rate: the same of normalisation layers, where they are trained; None takes that of the rest. In a
            head with a rate of its own, that counts.
        batch_size: examples per step.
        epochs: passes over the training data; None takes the paper's count for the task.
        warmup_ratio: share of the steps in which the rate rises linearly.
        lr_scheduler_type: as in ``transformers.TrainingArguments``.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        adapter: keys for the method's PEFT config.

    Raises:
        UserError: a value cannot be used.
    """

    learning_rate: float
    head_learning_rate: float | None = field(default=None, kw_only=True)
    norms_learning_rate: float | None = field(default=None, kw_only=True)
    batch_size: int = 16
    epochs: float | None = None
    warmup_ratio: float = 0.0
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adapter: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_number("learning_rate", self.learning_rate, above=0)
        for name, rate in self.own_learning_rates().items():
            check_number(name, rate, above=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_number("warmup_ratio", self.warmup_ratio, least=0, most=1)

    def own_learning_rates(self) -> dict[str, float]:
        """The rates of parts that have one of their own, by the name of the value."""
        rates = {name: getattr(self, name) for name in ("head_learning_rate", "norms_learning_rate")}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def with_settings(self, settings: dict[str, Any]) -> Recipe:
        """A copy with ``--set`` values: keys of the recipe, or of the method's PEFT config.

        Raises:
            UserError: a key is neither.
        """
        of_recipe = {f.name for f in dataclasses.fields(self)} - {"adapter", "learning_rate", "batch_size", "epochs"}
        recipe = {key: value for key, value in settings.items() if key in of_recipe}
        adapter = {key: value for key, value in settings.items() if key not in of_recipe}
        return dataclasses.replace(self, **recipe, adapter={**self.adapter, **adapter})


_MEMORY = {"num_parents": 16, "num_children": 3, "top_k": 8}
_PAPER = {
    "spartan": Recipe(1e-3, adapter=_MEMORY),
    "full": Recipe(2e-5),
    "head": Recipe(1e-3),
    "lora": Recipe(1e-4, adapter={"r": 8, "lora_alpha": 16}),
    "pfeiffer": Recipe(1e-4, adapter={"style": "pfeiffer", "reduction_factor": 12}),
    "houlsby": Recipe(1e-4, adapter={"style": "houlsby", "reduction_factor": 12}),
    "ia3": Recipe(1e-4),
    "bitfit": Recipe(1e-4),
}
_BEST = {
    "spartan": Recipe(
        1e-3, warmup_ratio=0.06, adapter=_MEMORY | {"value_initializer_range": 0.02, "train_layer_norms": True}
    ),
    "full": Recipe(5e-5, warmup_ratio=0.06, weight_decay=0.01),
    "head": Recipe(3e-2, warmup_ratio=0.06),
    "lora": Recipe(5e-4, warmup_ratio=0.06, adapter={"r": 8, "lora_alpha": 16}),
    "pfeiffer": Recipe(5e-4, warmup_ratio=0.06, adapter={"style": "pfeiffer", "reduction_factor": 12}),
    "houlsby": Recipe(5e-4, warmup_ratio=0.06, adapter={"style": "houlsby", "reduction_factor": 12}),
    "ia3": Recipe(5e-3, warmup_ratio=0.06),
    "bitfit": Recipe(3e-3, warmup_ratio=0.06),
}


def get_recipe(name: str, method: str) -> Recipe:
    """The recipe ``name`` ("best" or "paper") for ``method``."""
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", name, RECIPES))
    if method not in METHODS:
        raise UserError(unknown_name("method", method, METHODS))
    return (_PAPER if name == "paper" else _BEST)[method]
