"""What a run is made of: flags over a file over the recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsepeft.errors import UserError, first_line, unknown_name
from sparsepeft.spt import SptConfig
from sparsepeft.training.config_file import read_config
from sparsepeft.training.recipes import METHODS, RECIPES, Recipe, get_recipe
from sparsepeft.training.reporting import read_trackers
from sparsepeft.training.sparse import check_spt, join_spt_flags
from sparsepeft.tuners.config import SAVE_DTYPES, dtype_name

PRECISIONS = ("fp32", "bf16", "fp16")
SCORE_ON = ("validation", "selection")
_POSITIVE = ("epochs", "max_steps", "max_train_samples", "learning_rate", "batch_size", "max_length", "few_shot")


@dataclass
class RunConfig:
    """Everything that decides the outcome of a training run.

    Args:
        task: a task's name, see :func:`sparsepeft.tasks.task_names`, or ``"custom"`` with ``train_file``.
        output_dir: folder for weights, results and checkpoints.
        method: one of :data:`sparsepeft.training.recipes.METHODS`.
        model: hub id or local folder; None is the bundled MiniLM.
        recipe: where unset hyperparameters come from: ``"best"`` or ``"paper"``.
        few_shot: train on this many examples, stratified by label and drawn by ``seed``.
        score_on: ``"validation"`` reports on the validation (and test) set; ``"selection"`` on a tenth of the training
            data that is not trained on, and leaves the validation set alone: for choosing hyperparameters.
        problem_type: what the labels of own files are, see :func:`sparsepeft.tasks.load_task`; None looks at them.
        cache_frozen_layers: compute the outputs of frozen lower layers once per training example (and without dropout),
            where the adapter is kept to upper layers (``layers_to_transform``).
        compile: run the model through ``torch.compile``.
        report_to: names of trackers to report to while training, as in ``transformers.TrainingArguments``.
        settings: keys of the method's config (``num_parents``, ...) or of the optimisation (``weight_decay``, ...).
        spt: keys of :class:`sparsepeft.spt.SptConfig` to make the model sparse first; None leaves it dense.
        (the rest as their names say; None takes the recipe's or the task's value)
    """

    task: str
    output_dir: str
    method: str = "spartan"
    model: str | None = None
    recipe: str = "best"
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    problem_type: str | None = None
    epochs: float | None = None
    max_steps: int | None = None
    max_train_samples: int | None = None
    few_shot: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    seed: int = 42
    precision: str = "fp32"
    save_dtype: str | None = None
    score_on: str = "validation"
    cache_frozen_layers: bool = False
    compile: bool = False
    report_to: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    spt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.report_to = list(read_trackers(self.report_to))
        named = {"method": METHODS, "recipe": RECIPES, "precision": PRECISIONS, "score_on": SCORE_ON}
        check_values(self, named, _POSITIVE)
        if self.save_dtype is not None:
            try:
                self.save_dtype = dtype_name("save_dtype", self.save_dtype, SAVE_DTYPES)
            except ValueError as error:
                raise UserError(str(error)) from error
            if self.save_dtype == "int8" and self.method in ("full", "lora", "ia3"):
                raise UserError(
                    f"save_dtype='int8' was given with the method {self.method}, whose files PEFT or transformers read "
                    "without our scales; pass bf16."
                )
        self.recipe_values()  # unknown settings are found before anything is loaded
        if self.spt_config() is not None and self.cache_frozen_layers:
            raise UserError(
                "cache_frozen_layers was given with spt, but a sparse model trains routers or refreshes codebooks in "
                "every layer; leave one of them out."
            )

    def spt_config(self) -> SptConfig | None:
        """How the model is made sparse; None if it stays dense."""
        return check_spt(self.method, self.spt)

    def recipe_values(self) -> Recipe:
        """The recipe for this method and task with this config's own values put in."""
        return recipe_of(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


def check_values(config: Any, choices: Mapping[str, Iterable[str]], positive: Iterable[str]) -> None:
    """Refuse a config whose named fields are not among their choices, not positive, no flags, or no seed.

    Raises:
        UserError: naming the field and its value.
    """
    for name, valid in choices.items():
        if getattr(config, name) not in valid:
            raise UserError(unknown_name(name, str(getattr(config, name)), valid))
    for name in positive:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise UserError(f"`{name}={value!r}` was given, but it must be a positive number.")
    for flag in dataclasses.fields(config):
        value = getattr(config, flag.name)
        if isinstance(flag.default, bool) and not isinstance(value, bool):
            raise UserError(f"{flag.name}={value!r} was given, but {flag.name} must be true or false.")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed={config.seed!r} was given, but the seed must be a whole number of at least 0.")


def recipe_of(config: Any) -> Recipe:
    """The recipe that a config names, with the config's own values put in."""
    recipe = get_recipe(config.recipe, config.method).with_settings(config.settings)
    own = {key: getattr(config, key) for key in ("learning_rate", "batch_size") if getattr(config, key) is not None}
    return dataclasses.replace(recipe, **own)


def load_config(flags: dict[str, Any], file: Path | None = None) -> RunConfig:
    """Combine command-line flags (None means not given) with a YAML or JSON file.

    Args:
        flags: fields of :class:`RunConfig`, but ``spt`` as whether it was asked for, and ``spt_set`` with its settings.
        file: in which ``spt`` is a mapping of settings.

    Raises:
        UserError: the file cannot be read, has unknown keys, or task or output folder are missing.
    """
    values = merge_config(join_spt_flags(flags, read_config(file).get("spt")), file, RunConfig)
    if values.get("train_file") and not values.get("task"):
        values["task"] = "custom"
    for key, flag in (("task", "--task"), ("output_dir", "--output-dir")):
        if not values.get(key):
            raise UserError(f"No {key} was given; pass {flag} or set {key} in the config file.")
    return RunConfig(**values)


def merge_config(flags: dict[str, Any], file: Path | None, config_class: Any) -> dict[str, Any]:
    """Values for a config class from flags (None means not given) over a file; mappings in both are joined.

    A setting that is called like a field of the config is that field: ``--set epochs=3`` is ``--epochs 3``.

    Raises:
        UserError: the file cannot be read or has unknown keys, or a value is given twice.
    """
    values = {key: value for key, value in read_config(file).items() if value is not None}
    valid = {f.name for f in dataclasses.fields(config_class)}
    for key in values:
        if key not in valid:
            raise UserError(f"{file}: " + unknown_name("config key", str(key), valid))
    given = {key: value for key, value in flags.items() if value is not None}
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    settings = values.get("settings")
    if isinstance(settings, dict):
        fields = {key: settings[key] for key in sorted(valid.intersection(settings))}
        for key in fields:
            if key in values:
                raise UserError(f"{key} was given both as a setting and as an option; give it once.")
        values |= fields | {"settings": {key: value for key, value in settings.items() if key not in fields}}
    return values


def parse_settings(pairs: list[str], option: str = "--set", example: str = "top_k=4") -> dict[str, Any]:
    """``["top_k=4", "temperature=1.6"]`` -> ``{"top_k": 4, "temperature": 1.6}``; values are read as YAML."""
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise UserError(
                f"{option} {pair!r} was given, but settings have the form key=value, for example {option} {example}."
            )
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError for what looks like a date and is none
            raise UserError(
                f"{option} {pair!r} was given, but {value!r} cannot be read as a value ({first_line(error)}); quote "
                f"it as YAML does, for example {option} {example}."
            ) from error
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
            parsed = float(parsed) if isinstance(parsed, str) else parsed
        settings[key.strip()] = parsed
    return settings
