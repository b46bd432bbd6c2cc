"""What a run is made of: the values of a config over those of a recipe."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from sparsepeft.arguments import check_choice, check_number, check_whole
from sparsepeft.errors import UserError
from sparsepeft.methods.recipes import METHODS, RECIPES, Recipe, get_recipe
from sparsepeft.paths import with_absolute_paths
from sparsepeft.rows.decoding import known_encoding
from sparsepeft.rows.formats import read_delimiter
from sparsepeft.runs.config_values import SELECTION, read_class_weights, read_columns, read_thresholds, read_trackers
from sparsepeft.tasks.labels import problem_type_of
from sparsepeft.tasks.local import FileOptions
from sparsepeft.tasks.spec import LANGUAGE_MODEL as LM

if TYPE_CHECKING:
    from sparsepeft.spt import SptConfig

PRECISIONS = ("fp32", "bf16", "fp16")
SCORE_ON = ("validation", "selection")
LM_METHODS = tuple(method for method in METHODS if method != "head")  # a language model's head is its embedding
DATA_FIELDS = ("data_dir", *FileOptions.__annotations__)  # of labelled data, as in sparsepeft.tasks.load_task
_SHARED_DATA_FIELDS = ("text_column", "delimiter", "encoding")
LABELLED_FIELDS = (
    *(name for name in DATA_FIELDS if name not in _SHARED_DATA_FIELDS),
    *("max_train_samples", "few_shot", "score_on", "label_smoothing_factor", "class_weights", "eval_steps"),
    *("thresholds", "early_stopping_patience", "max_length", "save_dtype", "cache_frozen_layers", "compile"),
)
TEXT_FIELDS = ("text", "validation_text", "block_length", "bos_token")
_WHOLE = ("max_steps", "max_train_samples", "few_shot", "batch_size", "max_length", "eval_steps")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {  # of fields that are not None
    **dict.fromkeys((*_WHOLE, "early_stopping_patience", "gradient_accumulation_steps"), check_whole),
    "block_length": partial(check_whole, least=2),  # one token to predict another
    "epochs": partial(check_number, above=0),
    "label_smoothing_factor": partial(check_number, least=0, most=1),
    "seed": partial(check_whole, least=0, most=2**32 - 1),
    "problem_type": lambda name, value: problem_type_of(value),
    "delimiter": lambda name, value: read_delimiter(value),
    "encoding": lambda name, value: known_encoding(value),
}
OF_RECIPE = ("learning_rate", "batch_size", "weight_decay", "warmup_ratio", "lr_scheduler_type")
_RENAMED = {"gradient_accumulation": "gradient_accumulation_steps"}
_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a training run, on labelled texts or, with ``task="lm"``, on plain text.

    Fields of the one kind of task are refused by the other. Those for labelled texts are :data:`LABELLED_FIELDS`, those
    for language models :data:`TEXT_FIELDS`; the rest belongs to both.

    Args:
        task: a task's name, see :func:`sparsepeft.tasks.task_names`; ``"custom"`` with ``train_file``; or ``"lm"``,
            which fine-tunes the causal language model ``model`` on ``text``.
        output_dir: folder for weights, results and checkpoints.
        method: one of :data:`sparsepeft.methods.recipes.METHODS`; spartan if not given, for language models lora.
        model: hub id or local folder; None is the bundled MiniLM, which is no language model.
        data_dir, train_file, validation_file, test_file: where data is; like ``model``'s, relative paths are made
            absolute, so that the run can be used from any folder.
        text: files with the training text of a language model: .txt is one document, .jsonl, .csv and .tsv have one in
            each row; all of them also with .gz.
        validation_text: files with the text that perplexity is measured on; without them a tenth of ``text``.
        recipe: where unset hyperparameters come from: ``"best"`` or ``"paper"``.
        few_shot: train on this many examples, stratified by label and drawn by ``seed``.
        score_on: ``"validation"`` reports on the validation (and test) set; ``"selection"`` on a tenth of the training
            data that is not trained on, and leaves the validation set alone: for choosing hyperparameters.
        label_column: of own files: a name, or several in a list or with commas between them, which are columns of 0
            and 1; None looks for it.
        problem_type: what the labels of own files are, see :func:`sparsepeft.tasks.load_task`; None looks at them.
        text_column: of own files and of a language model's text; None looks for it, or takes ``text``.
        delimiter, encoding: of own files, see :func:`sparsepeft.tasks.load_task`; None looks at them. A language
            model's text is UTF-8 if no encoding is given.
        block_length: tokens of a language model's training example; None is what the model takes, at most 512.
        bos_token: begin each block with the begin-of-text token; None does if the tokenizer puts it before every text
            by itself, see :func:`sparsepeft.runs.corpus.begin_token`.
        weight_decay, warmup_ratio, lr_scheduler_type, label_smoothing_factor, gradient_accumulation_steps,
            gradient_checkpointing: as in ``transformers.TrainingArguments``; ``batch_size`` examples are in each of the
            accumulated batches.
        class_weights: how much the examples of a class count in the loss, by label (1 where it is not named), or
            ``"balanced"``: in inverse proportion to how many there are.
        thresholds: of tasks in which several labels may hold: the probability above which each does, or
            ``"selection"``: one for each label, chosen on the tenth that checkpoints are chosen on, too (see
            :func:`sparsepeft.tasks.thresholds.choose_thresholds`). Few-shot runs have none and keep to 0.5.
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

    Raises:
        UserError: a value cannot be used, or belongs to the other kind of task.

    Example:
        >>> RunConfig("topics", "out/topics", method="lora", learning_rate=3e-4, epochs=5).learning_rate
        0.0003
        >>> RunConfig("lm", "out/lm", model="MODEL", text="mine.txt", spt={"num_active_blocks": 0.25}).task
        'lm'
    """

    task: str
    output_dir: str
    method: str = ""
    model: str | None = None
    recipe: str = "best"
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text: tuple[str, ...] = ()
    validation_text: tuple[str, ...] = ()
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | tuple[str, ...] | None = None
    problem_type: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    block_length: int | None = None
    bos_token: bool | None = None
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
    thresholds: str | float = SELECTION
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
    report_to: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    spt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        values, defaults = with_absolute_paths(_plain_fields(self)), defaults_of(RunConfig)
        values |= {name: tuple(values[name]) for name in ("text", "validation_text")}
        refuse_foreign_fields(self.task, (name for name, value in values.items() if value != defaults[name]))
        usual = {"method": "lora", "text_column": "text"} if self.is_language_model else {"method": "spartan"}
        values |= {name: value for name, value in usual.items() if not values[name]}
        values |= {
            "precision": _SHORT_DTYPES.get(self.precision, self.precision),
            "report_to": read_trackers(self.report_to),
            "class_weights": read_class_weights(self.class_weights),
            "thresholds": read_thresholds(self.thresholds),
            "label_column": read_columns(self.label_column),
        }
        if self.save_dtype is not None:
            from sparsepeft.tuners.config import SAVE_DTYPES, dtype_name  # which loads PEFT

            values["save_dtype"] = dtype_name("save_dtype", self.save_dtype, SAVE_DTYPES)
        vars(self).update(values)
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        check_choice("method", self.method, LM_METHODS if self.is_language_model else METHODS)
        for name, valid in (("recipe", RECIPES), ("precision", PRECISIONS), ("score_on", SCORE_ON)):
            check_choice(name, getattr(self, name), valid)
        for name, check in _CHECKS.items():
            if getattr(self, name) is not None:
                check(name, getattr(self, name))
        self.recipe_values()  # unknown settings are found before anything is loaded

    def _check_combinations(self) -> None:
        is_sparse = self.spt_config() is not None
        require_fields(vars(self))
        if self.save_dtype == "int8" and self.method in ("full", "lora", "ia3"):
            raise UserError(
                f"`save_dtype=int8` was given with `method={self.method}`, whose files PEFT or transformers read "
                "without our scales; pass bf16."
            )
        for name in ("eval_steps", "early_stopping_patience"):
            if self.few_shot is not None and getattr(self, name) is not None:
                raise UserError(
                    f"`{name}` was given with `few_shot`, which trains on all examples and chooses no checkpoint; "
                    "leave one of them out."
                )
        if self.few_shot is not None and self.max_train_samples is not None:
            raise UserError(
                "`max_train_samples` was given with `few_shot`, which says how many examples are trained on; leave one "
                "of them out."
            )
        if is_sparse and self.cache_frozen_layers:
            raise UserError(
                "`cache_frozen_layers` was given with `spt`, but a sparse model trains routers or refreshes codebooks "
                "in every layer; leave one of them out."
            )
        if self.gradient_checkpointing and self.cache_frozen_layers:
            raise UserError(
                "`cache_frozen_layers` was given with `gradient_checkpointing`, but there is nothing to save in layers "
                "that are not run; leave one of them out."
            )

    @property
    def is_language_model(self) -> bool:
        """Whether the run fine-tunes a language model on plain text."""
        return self.task == LM

    def spt_config(self) -> SptConfig | None:
        """How the model is made sparse; None if it stays dense."""
        if self.spt is None:
            return None
        from sparsepeft.methods.sparse import check_spt  # which loads torch

        return check_spt(self.method, self.spt, self.is_language_model)

    def recipe_values(self) -> Recipe:
        """The recipe for this method with this config's own values put in.

        Raises:
            UserError: a value cannot be used, or is given both by the config's field and in its settings.
        """
        values = {name: getattr(self, name) for name in OF_RECIPE if getattr(self, name) is not None}
        for name in values:
            if name in self.settings:
                raise UserError(f"`{name}` was given both as a setting and as an option; give it once.")
        recipe = get_recipe(self.recipe, self.method).with_settings(self.settings)
        recipe = dataclasses.replace(recipe, **values)
        if self.is_language_model and recipe.head_learning_rate is not None:
            raise UserError(
                f"`head_learning_rate` was given with `task={LM}`, which has no head of its own; leave it out."
            )
        if recipe.lr_scheduler_type == "constant" and recipe.warmup_ratio:
            if values.get("warmup_ratio") or self.settings.get("warmup_ratio"):
                raise UserError(
                    f"`warmup_ratio={recipe.warmup_ratio}` was given with `lr_scheduler_type=constant`, which has no "
                    "warm-up; pass constant_with_warmup."
                )
            recipe = dataclasses.replace(recipe, warmup_ratio=0.0)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, without the fields that this kind of task does not have."""
        foreign = foreign_fields(self.task)
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in foreign}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def defaults_of(values_class: Any) -> dict[str, Any]:
    """The fields of a dataclass with what they are where nothing is given; None for those that must be given."""
    defaults = {}
    for each in dataclasses.fields(values_class):
        if each.default_factory is not dataclasses.MISSING:
            defaults[each.name] = each.default_factory()
        else:
            defaults[each.name] = None if each.default is dataclasses.MISSING else each.default
    return defaults


def foreign_fields(task: Any) -> tuple[str, ...]:
    """The fields that a task of this name does not have."""
    return LABELLED_FIELDS if task == LM else TEXT_FIELDS


def refuse_foreign_fields(task: Any, names: Iterable[str]) -> None:
    """See that a task has all the fields that were given.

    Raises:
        UserError: it does not have one.
    """
    foreign = sorted(set(names).intersection(foreign_fields(task)))
    if foreign and task == LM:
        is_one = len(foreign) == 1
        raise UserError(
            f"`{'`, `'.join(foreign)}` {'does' if is_one else 'do'} not go with `task={LM}`; leave "
            f"{'it' if is_one else 'them'} out."
        )
    if foreign:
        raise UserError(f"`{foreign[0]}` goes with `task={LM}` only, but the task is {task!r}; pass `task={LM}`.")


def require_fields(values: Mapping[str, Any]) -> None:
    """See that a config's values have what every task, or its kind of task, needs.

    Raises:
        UserError: some are missing.
    """
    names = ("task", "output_dir", *(("text", "model") if values.get("task") == LM else ()))
    if missing := [f"`{name}`" for name in names if not values.get(name)]:
        raise UserError(f"No {' and no '.join(missing)} was given; pass it, or set it in the config file.")


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values by the present names of its fields; files may have former ones."""
    return {_RENAMED.get(key, key): value for key, value in values.items()}


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(RunConfig)


def _plain_fields(config: RunConfig) -> dict[str, Any]:
    """A config's values as plain Python has them: paths as texts, NumPy's numbers as numbers.

    Fields that may hold lists, or texts as well as mappings, are left to what reads them.

    Raises:
        UserError: a value is of none of its field's types.
    """
    values = {}
    for name, hint in _types().items():
        value = getattr(config, name)
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
        elif isinstance(value, numbers.Integral) and not isinstance(value, bool) and kinds & {int, float}:
            value = int(value)
        elif isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) and kinds & {int, float}:
            value = float(value)  # whether it is whole is looked at later
        words = [word for kind, word in _WORDS.items() if kind in kinds]
        allowed = tuple(kinds | ({int, float} if kinds & {int, float} else set()))
        is_read_elsewhere = bool(kinds & {list, tuple}) or kinds >= {str, dict}
        if not is_read_elsewhere and (not isinstance(value, allowed) or (value is True and bool not in kinds)):
            raise UserError(f"`{name}={value}` was given, but it must be {' or '.join(words)}.")
        values[name] = value
    return values
