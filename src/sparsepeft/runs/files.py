"""The files of a run's folder, and reading its ``run.json``."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED, in_use, settle
from sparsepeft.methods.recipes import Recipe
from sparsepeft.paths import with_absolute_paths
from sparsepeft.runs.config import LM, RunConfig, current_names, defaults_of, foreign_fields
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import Columns

logger = logging.getLogger(__name__)

RUN, RESULTS, HISTORY = "run.json", "results.json", "history.jsonl"
CHECKPOINTS, LOGS = "checkpoints", "logs"
HELD_OUT = "held_out.json"  # which rows were, where they were drawn: see sparsepeft.runs.held_out
PLAN = "spt_plan"  # in run.json: how a sparse model keeps to its budget
THRESHOLDS = "thresholds"  # in run.json and results.json: by label, where several may hold, not all of them 0.5
RESULTS_VERSION = 1
RUN_VERSION = 1
# What a run leaves at most: an adapter, or a model with its tokenizer.
WRITTEN = (
    *(RUN, RESULTS, HELD_OUT, HISTORY, LOGS, "README.md", "adapter_config.json", "adapter_model.safetensors"),
    CHECKPOINTS,  # of a run that an earlier version of this package left unfinished
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)


def describe_run(config: RunConfig) -> dict[str, Any]:
    """The content of ``run.json``, as far as it is known before data are read."""
    return {"format_version": RUN_VERSION, "config": config.to_dict(), "recipe": vars(config.recipe_values())}


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a finished run's folder; says so where another training was to replace it and was interrupted.

    Raises:
        UserError: this is no run's folder, the run is not finished, or the file is damaged or of a newer version.
    """
    settle(folder)
    if not (folder / RUN).is_file():
        if (folder / UNFINISHED / RUN).is_file():
            raise UserError(f"{folder} holds no trained weights yet; finish its training by the same command.")
        raise UserError(f"{folder} holds no run ({RUN} is missing); pass the output folder of `sparsepeft train`.")
    if (folder / UNFINISHED / RUN).is_file() and not in_use(folder):
        _warn_once(
            f"The run in {folder} was to be replaced, but the new training was interrupted, so the former run answers; "
            f"repeat the command of the training to finish it, or remove {folder / UNFINISHED} to keep the former run."
        )
    return read_run_file(folder / RUN)


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a finished run's folder.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again with `overwrite`.") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} is damaged (it holds no object); train again with `overwrite`.")
    return results


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def spec_of(run: dict[str, Any]) -> TaskSpec:
    """The task a run was trained on, from its ``run.json``."""
    values = dict(run["task"])
    for name in ("text_columns", "label_names", "metrics"):
        values[name] = tuple(values[name]) if values[name] is not None else None
    return TaskSpec(**values)


def columns_of(run: dict[str, Any]) -> Columns | None:
    """What texts and label were called in the training file, from a ``run.json``; None where it does not say."""
    columns = run.get("columns")
    if not columns:
        return None
    label = columns["label"]
    return Columns(tuple(columns["texts"]), label if isinstance(label, str) else tuple(label))


def thresholds_of(run: dict[str, Any]) -> tuple[float, ...] | None:
    """The probability above which each label of a run's task holds, from its ``run.json``; None is 0.5 for all."""
    by_label = run.get(THRESHOLDS)
    return tuple(float(by_label[name]) for name in run["task"]["label_names"]) if by_label else None


def read_run_file(path: Path) -> dict[str, Any]:
    """The content of a ``run.json``; fields that are newer than the file have their defaults.

    Raises:
        UserError: it is damaged, of a newer version, or has keys that are not known here.
    """
    try:
        run: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again with `overwrite`.") from error
    parts = ("config", "task")
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("config"), dict)
        or not (isinstance(run.get("task"), dict) or run.get("task") == LM)
    ):
        raise UserError(f"{path} is damaged (it lacks {' or '.join(parts)}); train again with `overwrite`.")
    version = run.get("format_version", 0)  # the first ones had none
    if not isinstance(version, int) or version > RUN_VERSION:
        raise UserError(
            f"{path} has the format version {version}, but this version of sparsepeft reads up to {RUN_VERSION}; "
            "upgrade sparsepeft."
        )
    is_lm = run["task"] == LM
    if is_lm and "bos_token_id" not in run:  # its blocks begin with no token
        run |= {"config": {"bos_token": False} | run["config"], "bos_token_id": None}
    foreign = foreign_fields(LM if is_lm else None)
    config_defaults = {name: value for name, value in defaults_of(RunConfig).items() if name not in foreign}
    run["config"] = config_defaults | current_names(run["config"])
    if not is_lm:
        if lacking := _lacking(run["task"]):
            raise UserError(f"{path} is damaged (its task lacks {', '.join(lacking)}); train again with `overwrite`.")
        run["task"] = defaults_of(TaskSpec) | run["task"]
    known = {"config": config_defaults.keys(), "recipe": defaults_of(Recipe).keys(), "task": defaults_of(TaskSpec)}
    others = {
        "format_version",
        "data_fingerprints",
        "bos_token_id",
        "columns",
        "backbone_fingerprint",
        PLAN,
        THRESHOLDS,
    }
    for part, valid in {"": others | known.keys(), **known}.items():
        values = run.get(part) if part else run
        for key in values if isinstance(values, dict) else ():
            if key not in valid:
                where = f" of {part}" if part else ""
                raise UserError(
                    f"{path} has the key {key!r}{where}, which this version of sparsepeft does not know; upgrade "
                    "sparsepeft, or remove the key if you added it."
                )
    if not is_lm:
        try:
            spec_of(run)
            thresholds_of(run)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged (its task: {error}); train again with `overwrite`.") from error
    return run | {"config": with_absolute_paths(run["config"])}


def _lacking(task: dict[str, Any]) -> list[str]:
    """Names of what a task must have and has not; of its values only the labels' names may be null."""
    required = [field.name for field in dataclasses.fields(TaskSpec) if field.default is dataclasses.MISSING]
    return [name for name in required if task.get(name) is None and (name not in task or name != "label_names")]
