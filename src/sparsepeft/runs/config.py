"""What a run is made of: flags over a file over the recipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsepeft.errors import UserError, first_line, unknown_name
from sparsepeft.methods.recipes import METHODS, RECIPES, Recipe, get_recipe
from sparsepeft.methods.sparse import check_spt, join_spt_flags
from sparsepeft.paths import with_absolute_paths
from sparsepeft.runs.checks import check_number, check_values, plain_fields
from sparsepeft.runs.config_file import read_config
from sparsepeft.spt import SptConfig
from sparsepeft.tasks.decoding import known_encoding
from sparsepeft.tasks.formats import read_delimiter
from sparsepeft.tasks.labels import problem_type_of
from sparsepeft.training.loss import read_class_weights
from sparsepeft.training.reporting import read_trackers
from sparsepeft.tuners.config import SAVE_DTYPES, dtype_name

PRECISIONS = ("fp32", "bf16", "fp16")
SCORE_ON = ("validation", "selection")
_WHOLE = (
    "max_steps",
    "max_train_samples",
    "few_shot",
    "batch_size",
    "max_length",
    "eval_steps",
    "early_stopping_patience",
    "gradient_accumulation_steps",
)
_RENAMED = {"gradient_accumulation": "gradient_accumulation_steps"}
_OF_RECIPE = ("learning_rate", "batch_size", "weight_decay", "warmup_ratio", "lr_scheduler_type")


@dataclass
class RunConfig:
    """Everything that decides the outcome of a training run.

    Args:
        task: a task's name, see :func:`sparsepeft.tasks.task_names`, or ``"custom"`` with ``train_file``.
        output_dir: folder for weights, results and checkpoints.
        method: one of :data:`sparsepeft.methods.recipes.METHODS`.
        model: hub id or local folder; None is the bundled MiniLM.
        data_dir, train_file, validation_file, test_file: where data is; like ``model``'s, relative paths are made
            absolute, so that the run can be used from any folder.
        recipe: where unset hyperparameters come from: ``"best"`` or ``"paper"``.
        few_shot: train on this many examples, stratified by label and drawn by ``seed``.
        score_on: ``"validation"`` reports on the validation (and test) set; ``"selection"`` on a tenth of the training
            data that is not trained on, and leaves the validation set alone: for choosing hyperparameters.
        problem_type: what the labels of own files are, see :func:`sparsepeft.tasks.load_task`; None looks at them.
        delimiter, encoding: of own files, see :func:`sparsepeft.tasks.load_task`; None looks at them.
        weight_decay, warmup_ratio, lr_scheduler_type, label_smoothing_factor, gradient_accumulation_steps,
            gradient_checkpointing: as in ``transformers.TrainingArguments``; ``batch_size`` examples are in each of the
            accumulated batches.
        class_weights: how much the examples of a class count in the loss, by label (1 where it is not named), or
            ``"balanced"``: in inverse proportion to how many there are.
        eval_steps: score the tenth that checkpoints are chosen on every so many steps; None does it ten times.
        early_stopping_patience: stop when the score has not improved in so many of these.
        device: ``cpu``, ``cuda`` or ``mps``; None is the accelerator if there is one. Decides where, not what is
            trained: a run may be resumed on another.
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
    delimiter: str | None = None
    encoding: str | None = None
    epochs: float | None = None
    max_steps: int | None = None
    max_train_samples: int | None = None
    few_shot: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None
    lr_scheduler_type: str | None = None
    label_smoothing_factor: float | None = None
    class_weights: str | dict[str, float] | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    max_length: int | None = None
    seed: int = 42
    precision: str = "fp32"
    save_dtype: str | None = None
    score_on: str = "validation"
    cache_frozen_layers: bool = False
    compile: bool = False
    device: str | None = None
    report_to: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    spt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        vars(self).update(with_absolute_paths(plain_fields(self)))
        self.precision = short_precision(self.precision)
        self.report_to = list(read_trackers(self.report_to))
        named = {"method": METHODS, "recipe": RECIPES, "precision": PRECISIONS, "score_on": SCORE_ON}
        check_values(self, named, positive=("epochs",), whole=_WHOLE)
        if self.label_smoothing_factor is not None:
            check_number("label_smoothing_factor", self.label_smoothing_factor, least=0, most=1)
        self.class_weights = read_class_weights(self.class_weights)
        problem_type_of(self.problem_type)
        for check, given in ((read_delimiter, self.delimiter), (known_encoding, self.encoding)):
            if given is not None:
                check(given)
        if self.save_dtype is not None:
            try:
                self.save_dtype = dtype_name("save_dtype", self.save_dtype, SAVE_DTYPES)
            except ValueError as error:
                raise UserError(str(error)) from error
            if self.save_dtype == "int8" and self.method in ("full", "lora", "ia3"):
                raise UserError(
                    f"`save_dtype=int8` was given with `method={self.method}`, whose files PEFT or transformers read "
                    "without our scales; pass bf16."
                )
        self.recipe_values()  # unknown settings are found before anything is loaded
        for name in ("eval_steps", "early_stopping_patience"):
            if self.few_shot is not None and getattr(self, name) is not None:
                raise UserError(
                    f"`{name}` was given with `few_shot`, which trains on all examples and chooses no checkpoint; "
                    "leave one of them out."
                )
        if self.spt_config() is not None and self.cache_frozen_layers:
            raise UserError(
                "`cache_frozen_layers` was given with `spt`, but a sparse model trains routers or refreshes codebooks "
                "in every layer; leave one of them out."
            )
        if self.gradient_checkpointing and self.cache_frozen_layers:
            raise UserError(
                "`cache_frozen_layers` was given with `gradient_checkpointing`, but there is nothing to save in layers "
                "that are not run; leave one of them out."
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


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values by the present names of its fields; files may have former ones."""
    return {_RENAMED.get(key, key): value for key, value in values.items()}


def short_precision(name: str) -> str:
    """``fp32`` for PyTorch's ``float32``, and so on; anything else as it is."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def recipe_of(config: Any) -> Recipe:
    """The recipe that a config names, with the config's own values put in.

    Raises:
        UserError: a value cannot be used, or is given both by the config's field and in its settings.
    """
    own = {key: getattr(config, key) for key in _OF_RECIPE if getattr(config, key, None) is not None}
    for key in own:
        if key in config.settings:
            raise UserError(f"`{key}` was given both as a setting and as an option; give it once.")
    recipe = dataclasses.replace(get_recipe(config.recipe, config.method).with_settings(config.settings), **own)
    if recipe.lr_scheduler_type == "constant" and recipe.warmup_ratio:
        if own.get("warmup_ratio") or config.settings.get("warmup_ratio"):
            raise UserError(
                f"`warmup_ratio={recipe.warmup_ratio}` was given with `lr_scheduler_type=constant`, which has no "
                "warm-up; pass constant_with_warmup."
            )
        recipe = dataclasses.replace(recipe, warmup_ratio=0.0)
    return recipe


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
    missing = [f"`{key}`" for key in ("task", "output_dir") if not values.get(key)]
    if missing:
        raise UserError(f"No {' and no '.join(missing)} was given; pass it, or set it in the config file.")
    return RunConfig(**values)


def merge_config(flags: dict[str, Any], file: Path | None, config_class: Any) -> dict[str, Any]:
    """Values for a config class from flags (None means not given) over a file; mappings in both are joined.

    A setting that is called like a field of the config is that field: ``--set epochs=3`` is ``--epochs 3``.

    Raises:
        UserError: the file cannot be read or has unknown keys, or a value is given twice.
    """
    values = {key: value for key, value in current_names(read_config(file)).items() if value is not None}
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
                raise UserError(f"`{key}` was given both as a setting and as an option; give it once.")
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
