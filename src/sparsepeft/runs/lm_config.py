"""What fine-tuning a language model is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.methods.recipes import METHODS, RECIPES, Recipe
from sparsepeft.methods.sparse import check_spt, join_spt_flags
from sparsepeft.paths import with_absolute_paths
from sparsepeft.runs.checks import check_choice, check_values, plain_fields
from sparsepeft.runs.config import PRECISIONS, merge_config, recipe_of, short_precision
from sparsepeft.runs.config_file import read_config
from sparsepeft.spt import SptConfig
from sparsepeft.tasks.decoding import known_encoding
from sparsepeft.tasks.formats import read_delimiter
from sparsepeft.training.reporting import read_trackers

LM = "lm"
LM_METHODS = tuple(method for method in METHODS if method != "head")  # a language model's head is its embedding
_LM_ONLY = ("text", "validation_text", "block_length", "bos_token")
_WHOLE = ("max_steps", "batch_size", "block_length", "gradient_accumulation_steps")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Everything that decides the outcome of fine-tuning a language model.

    Args:
        text: files with the training text: .txt is one document, .jsonl, .csv and .tsv have one in each row; all of
            them also with .gz.
        output_dir: folder for weights, results and checkpoints.
        model: hub id or local folder of a causal language model.
        validation_text: files with the text that perplexity is measured on; without them a tenth of ``text``.
        text_column, delimiter, encoding: of the files with rows; encoding also of .txt, UTF-8 if not given.
        method: one of :data:`LM_METHODS`.
        recipe: where unset hyperparameters come from: ``"best"`` or ``"paper"``.
        block_length: tokens of a training example; None is what the model takes, at most 512.
        bos_token: begin each block with the begin-of-text token; None does if the tokenizer puts it before every text
            by itself, see :func:`sparsepeft.runs.corpus.begin_token`.
        epochs: passes over the training text; None is the recipe's, or 1.
        weight_decay, warmup_ratio, lr_scheduler_type: as in ``transformers.TrainingArguments``.
        gradient_accumulation_steps: batches that make a step.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        device: ``cpu``, ``cuda`` or ``mps``; None is the accelerator if there is one.
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
    delimiter: str | None = None
    encoding: str | None = None
    method: str = "lora"
    recipe: str = "best"
    block_length: int | None = None
    bos_token: bool | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None
    lr_scheduler_type: str | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    device: str | None = None
    seed: int = 42
    report_to: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    spt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        absolute = with_absolute_paths(plain_fields(self))  # so that the run can be used from any folder
        vars(self).update(absolute | {name: tuple(absolute[name]) for name in ("text", "validation_text")})
        object.__setattr__(self, "report_to", read_trackers(self.report_to))
        object.__setattr__(self, "precision", short_precision(self.precision))
        named = {"method": LM_METHODS, "recipe": RECIPES, "precision": PRECISIONS}
        check_values(self, named, positive=("epochs",), whole=_WHOLE)
        check_choice("task", self.task, (LM,))
        if self.block_length == 1:
            raise UserError("`block_length=1` was given, but a block needs at least 2 tokens, one to predict another.")
        if self.bos_token not in (None, True, False):
            raise UserError(f"`bos_token={self.bos_token}` was given, but bos_token must be true or false.")
        for check, given in ((read_delimiter, self.delimiter), (known_encoding, self.encoding)):
            if given is not None:
                check(given)
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
    for name in _LM_ONLY:
        if flags.get(name) is not None:
            raise UserError(f"`{name}` goes with `task={LM}` only, but the task is {task!r}; pass `task={LM}`.")
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
        raise UserError(f"`{'`, `'.join(foreign)}` does not go with `task={LM}`; leave it out.")
    values = merge_config(given, file, LanguageModelConfig)
    for key in ("text", "model", "output_dir"):
        if not values.get(key):
            raise UserError(f"No {key} was given; pass `{key}` or set {key} in the config file.")
    return LanguageModelConfig(**values)
