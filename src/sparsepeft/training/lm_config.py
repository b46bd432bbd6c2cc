"""What fine-tuning a language model is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.spt import SptConfig
from sparsepeft.training.config import PRECISIONS, check_values, merge_config, recipe_of
from sparsepeft.training.config_file import read_config
from sparsepeft.training.recipes import METHODS, RECIPES, Recipe
from sparsepeft.training.reporting import read_trackers
from sparsepeft.training.sparse import check_spt, join_spt_flags

LM = "lm"
LM_METHODS = tuple(method for method in METHODS if method != "head")  # a language model's head is its embedding
_POSITIVE = ("epochs", "max_steps", "learning_rate", "batch_size", "block_length", "gradient_accumulation")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Everything that decides the outcome of fine-tuning a language model.

    Args:
        text: files with the training text: .txt is one document, .jsonl, .csv and .tsv have one in each row; all of
            them also with .gz.
        output_dir: folder for weights, results and checkpoints.
        model: hub id or local folder of a causal language model.
        validation_text: files with the text that perplexity is measured on; without them a tenth of ``text``.
        text_column: of the files with rows.
        method: one of :data:`LM_METHODS`.
        recipe: where unset hyperparameters come from: ``"best"`` or ``"paper"``.
        block_length: tokens of a training example; None is what the model takes, at most 512.
        epochs: passes over the training text; None is the recipe's, or 1.
        gradient_accumulation: batches that make a step.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        report_to: names of trackers to report to while training, as in ``transformers.TrainingArguments``.
        settings: keys of the method's config (``r``, ...) or of the optimisation (``weight_decay``, ...).
        spt: keys of :class:`sparsepeft.spt.SptConfig` to make the model sparse first; None leaves it dense.
        (the rest as their names say; None takes the recipe's value)

    Raises:
        UserError: a value cannot be used.
    """

    text: tuple[str, ...]
    output_dir: str
    model: str
    task: str = LM
    validation_text: tuple[str, ...] = ()
    text_column: str = "text"
    method: str = "lora"
    recipe: str = "best"
    block_length: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    seed: int = 42
    report_to: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    spt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("text", "validation_text"):
            files = getattr(self, name)
            object.__setattr__(self, name, (files,) if isinstance(files, str) else tuple(files))
        object.__setattr__(self, "report_to", read_trackers(self.report_to))
        check_values(self, {"method": LM_METHODS, "recipe": RECIPES, "precision": PRECISIONS}, _POSITIVE)
        for name in ("batch_size", "block_length", "gradient_accumulation", "max_steps"):
            if isinstance(getattr(self, name), float):
                raise UserError(f"{name}={getattr(self, name)!r} was given, but {name} must be a whole number.")
        if self.block_length == 1:
            raise UserError("block_length=1 was given, but a block needs at least 2 tokens, one to predict another.")
        self.recipe_values()  # unknown settings are found before anything is loaded
        self.spt_config()

    def recipe_values(self) -> Recipe:
        """The recipe for this method with this config's own values put in."""
        return recipe_of(self)

    def spt_config(self) -> SptConfig | None:
        """How the model is made sparse; None if it stays dense."""
        return check_spt(self.method, self.spt)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


def is_language_model(flags: dict[str, Any], file: Path | None = None) -> bool:
    """Whether command-line flags over a config file ask for fine-tuning a language model.

    Raises:
        UserError: they do not, but give what only that takes.
    """
    task = flags.get("task") or read_config(file).get("task")
    if task == LM:
        return True
    for name in ("text", "validation_text", "block_length", "gradient_accumulation", "gradient_checkpointing"):
        if flags.get(name) is not None:
            raise UserError(f"{_option(name)} goes with --task lm only, but the task is {task!r}; pass --task lm.")
    return False


def load_language_model_config(flags: dict[str, Any], file: Path | None = None) -> LanguageModelConfig:
    """Combine command-line flags (None means not given) with a YAML or JSON file.

    Args:
        flags: fields of :class:`LanguageModelConfig`, but ``spt`` as whether it was asked for, and ``spt_set`` with its
            settings.
        file: in which ``spt`` is a mapping of settings.

    Raises:
        UserError: a flag belongs to other tasks, the file cannot be read or has unknown keys, or something is missing.
    """
    # The data folder may come from the environment, where it is meant for other tasks.
    given = {key: value for key, value in flags.items() if key != "data_dir"}
    given = join_spt_flags(given, read_config(file).get("spt"))
    fields = {each.name for each in dataclasses.fields(LanguageModelConfig)}
    if foreign := sorted(given.keys() - fields):
        raise UserError(f"{', '.join(map(_option, foreign))} does not go with --task lm; leave it out.")
    values = merge_config(given, file, LanguageModelConfig)
    for key in ("text", "model", "output_dir"):
        if not values.get(key):
            raise UserError(f"No {key} was given; pass {_option(key)} or set {key} in the config file.")
    return LanguageModelConfig(**values)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
