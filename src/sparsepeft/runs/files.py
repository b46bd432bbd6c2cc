"""The files of a run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import UNFINISHED, check_place, finish, in_use, locked, remove, settle, write_json
from sparsepeft.methods.recipes import Recipe
from sparsepeft.models.quantized import cast_for_saving
from sparsepeft.paths import with_absolute_paths, without_folders
from sparsepeft.runs.config import RunConfig, current_names
from sparsepeft.runs.lm_config import LM, LanguageModelConfig
from sparsepeft.runs.output_folder import (
    CHECKPOINTS,
    HISTORY,
    LOGS,
    RESULTS,
    RUN,
    check_output_folder,
    has_checkpoint,
)
from sparsepeft.tasks import TaskData, TaskSpec
from sparsepeft.tasks.columns import Columns
from sparsepeft.tuners.config import TaskAdapterConfig

HELD_OUT = "held_out.json"  # which rows were, where they were drawn: see sparsepeft.runs.held_out
RESULTS_VERSION = 1
RUN_VERSION = 1
_NOT_TRAINED = {"output_dir", "save_dtype", "device", "report_to"}  # of a config: decides nothing before the end
_KEPT = (RUN, CHECKPOINTS, HISTORY, LOGS)  # of an interrupted run, which goes on from it
# What a run leaves at most: an adapter, or a model with its tokenizer.
WRITTEN = (
    RUN,
    RESULTS,
    HELD_OUT,
    HISTORY,
    LOGS,
    CHECKPOINTS,  # of a run that an earlier version of this package left unfinished
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def write_weights(
    folder: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, save_dtype: str | None
) -> int:
    """Save the trained weights into ``folder``, whole or not at all.

    An adapter is saved without the backbone and its tokenizer; a fully tuned model with everything. Where saving
    rounds, the model then has the rounded weights, so that it is scored as it will be read.

    Returns:
        Bytes of the weight files.

    Raises:
        RunFailed: the files could not be written; what was in the folder is untouched.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if isinstance(model, PeftModel):
            _save_adapter(model, temporary, save_dtype)
        else:
            _save_model(model, temporary, save_dtype)
            tokenizer.save_pretrained(str(temporary))
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise RunFailed(
            f"The trained weights could not be written to {folder} ({error}); free space and resume."
        ) from error
    except ValueError as error:  # values that the dtype cannot hold
        raise RunFailed(f"The trained weights could not be saved with save_dtype={save_dtype!r}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _save_adapter(model: PeftModel, folder: Path, save_dtype: str | None) -> None:
    config = model.peft_config["default"]
    if isinstance(config, TaskAdapterConfig):
        config.save_dtype = save_dtype
    model.save_pretrained(str(folder))
    if save_dtype is None:
        return
    if not isinstance(config, TaskAdapterConfig):  # PEFT's own methods save what is in memory
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        save_file(cast_for_saving(load_file(weights), save_dtype), weights, metadata={"format": "pt"})
    model.load_adapter(str(folder), "default", is_trainable=True)


def _save_model(model: PreTrainedModel, folder: Path, save_dtype: str | None) -> None:
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    rounded = cast_for_saving(weights, save_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = rounded[name]
    model.save_pretrained(str(folder))
    for name, parameter in model.named_parameters():
        parameter.data = rounded[name].to(weights[name].dtype)


def describe_run(config: RunConfig | LanguageModelConfig, recipe: Recipe) -> dict[str, Any]:
    """The content of ``run.json``, as far as it is known before data are read."""
    return {"format_version": RUN_VERSION, "config": config.to_dict(), "recipe": vars(recipe)}


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a finished run's folder.

    Raises:
        UserError: this is no run's folder, the run is not finished or was to be replaced by one that was interrupted,
            or the file is damaged or of a newer version.
    """
    settle(folder)
    if not (folder / RUN).is_file():
        if (folder / UNFINISHED / RUN).is_file():
            raise UserError(f"{folder} holds no trained weights yet; finish its training by the same command.")
        raise UserError(f"{folder} holds no run ({RUN} is missing); pass the output folder of `sparsepeft train`.")
    if (folder / UNFINISHED / RUN).is_file() and not in_use(folder):
        raise UserError(
            f"The run in {folder} was to be replaced, but the new training was interrupted; repeat its command to "
            f"finish it, or remove {folder / UNFINISHED} to go on with the former run."
        )
    return _read(folder / RUN)


def check_folder(folder: Path, run: dict[str, Any], overwrite: bool) -> bool:
    """See that a run may start, or go on, in ``folder``.

    Args:
        folder: of the run.
        run: what is known of its ``run.json``.
        overwrite: it may take the place of another run.

    Returns:
        Whether the very same run was interrupted there and can go on.

    Raises:
        UserError: the folder is a file, or holds anything that is no run's, a finished run, or one that was interrupted
            after a checkpoint and has other values.
        RunFailed: it cannot be written to.
    """
    check_output_folder(folder, overwrite)
    if not (folder / UNFINISHED / RUN).exists():
        return False
    is_protected = has_checkpoint(folder) and not overwrite
    try:
        differing = _differing(_read(folder / UNFINISHED / RUN), run)
    except UserError:
        if is_protected:
            raise
        return False
    if differing and is_protected:
        raise UserError(
            f"{folder} holds an unfinished run with other values of {', '.join(differing)}; repeat its command to "
            "resume it, pass another `output_dir`, or `overwrite` to start anew."
        )
    return not differing


@contextlib.contextmanager
def open_run(folder: Path, run: dict[str, Any], overwrite: bool) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Hold a run's folder, so that no other process starts there, until the run is finished.

    A run works in a part of its folder, whose files then take the place of a former run's. If the run is interrupted,
    what it has written stays there, to go on from.

    Args:
        folder: of the run.
        run: what is known of its ``run.json`` before anything is loaded.
        overwrite: the run may take the place of another.

    Yields:
        What begins the work: takes the whole content of ``run.json``, and returns where to write.

    Raises:
        UserError: as for :func:`check_folder`, or another process is writing to the folder.
        RunFailed: files cannot be written or moved.
    """
    check_folder(folder, run, overwrite)
    work, has_begun = folder / UNFINISHED, False

    def begin(run: dict[str, Any]) -> Path:
        nonlocal has_begun
        goes_on, has_begun = check_folder(folder, run, overwrite), True
        for path in work.iterdir() if work.exists() else ():
            if not goes_on or path.name not in _KEPT:
                remove(path)
        write_json(work / RUN, run)
        return work

    with locked(folder):
        try:
            yield begin
            check_place(folder, work, _former(folder))
            remove(work / CHECKPOINTS)
            finish(folder, work, _former(folder))
        except Exception as error:
            if has_begun and not has_checkpoint(folder):  # there is nothing to go on from
                remove(work)
            if has_begun and isinstance(error, OSError):
                raise RunFailed(
                    f"The run in {folder} could not be written ({error}); free space and resume."
                ) from error
            raise


def _former(folder: Path) -> tuple[str, ...]:
    """Names of what may be a former run's, for one that has no list of its files."""
    return WRITTEN if (folder / RUN).exists() else ()


def can_resume(folder: Path, config: RunConfig) -> bool:
    """Whether the very same run was interrupted in ``folder`` after a checkpoint."""
    run = describe_run(config, config.recipe_values())
    return check_folder(folder, run, overwrite=True) and (folder / UNFINISHED / CHECKPOINTS).exists()


def spec_of(run: dict[str, Any]) -> TaskSpec:
    """The task a run was trained on, from its ``run.json``."""
    values = dict(run["task"])
    for name in ("text_columns", "label_names", "metrics"):
        values[name] = tuple(values[name]) if values[name] is not None else None
    return TaskSpec(**values)


def columns_of(run: dict[str, Any]) -> Columns | None:
    """What texts and label were called in the training file, from a ``run.json``; None where it does not say."""
    found = run.get("columns")
    return Columns(tuple(found["texts"]), found["label"]) if found else None


def scored_part(parts: Container[str]) -> str:
    """The part that a run's one score is about: the test part where there is one."""
    return next(name for name in ("test", "validation", "selection") if name in parts)


def results_of(
    config: RunConfig, data: TaskData, metrics: dict[str, dict[str, float]], **measured: Any
) -> dict[str, Any]:
    """The content of ``results.json``.

    ``score`` is the main metric on the test part if there is one, or else on what was
    scored (the validation set, or the part of the training data that ``score_on`` asked for).
    """
    split = scored_part(metrics)
    return {
        "format_version": RESULTS_VERSION,
        "task": data.spec.name,
        "method": config.method,
        "recipe": config.recipe,
        "seed": config.seed,
        "score": metrics[split][data.spec.main_metric],
        "score_split": split,
        "main_metric": data.spec.main_metric,
        "metrics": metrics,
        **measured,
        "notes": list(data.notes),
        "data_source": data.source,
        "data_fingerprints": dict(data.fingerprints),
        "config": {
            key: value
            for key, value in without_folders(config.to_dict()).items()
            if key not in ("output_dir", "data_dir", "model", "device", "report_to")
        },
    }


def _read(path: Path) -> dict[str, Any]:
    """The content of a ``run.json`` that this version knows all keys of; one without a format version is old."""
    try:
        run: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again with `overwrite`.") from error
    parts = ("config", "task")
    if not isinstance(run, dict) or not all(part in run for part in parts) or not isinstance(run["config"], dict):
        raise UserError(f"{path} is damaged (it lacks {' or '.join(parts)}); train again with `overwrite`.")
    version = run.get("format_version", 0)
    if not isinstance(version, int) or version > RUN_VERSION:
        raise UserError(
            f"{path} has the format version {version}, but this version of sparsepeft reads up to {RUN_VERSION}; "
            "upgrade sparsepeft."
        )
    classes = {"config": LanguageModelConfig if run["task"] == LM else RunConfig, "recipe": Recipe, "task": TaskSpec}
    run["config"] = current_names(run["config"])
    if run["task"] == LM and "bos_token_id" not in run:  # its blocks begin with no token
        run |= {"config": {"bos_token": False} | run["config"], "bos_token_id": None}
    for part in ("config", "task"):  # fields that are newer than the file have their defaults there
        if isinstance(run[part], dict):
            run[part] = _defaults(classes[part]) | run[part]
    _check_keys(
        path,
        "",
        run,
        {"format_version", "data_fingerprints", "bos_token_id", "columns", "backbone_fingerprint", *classes},
    )
    for part, values_of in classes.items():
        if isinstance(run.get(part), dict):
            _check_keys(path, f" of {part}", run[part], {field.name for field in dataclasses.fields(values_of)})
    return run | {"config": with_absolute_paths(run["config"])}


def _defaults(values: Any) -> dict[str, Any]:
    """What the fields of a class of values are where nothing is given."""
    fields = dataclasses.fields(values)
    plain = {each.name: each.default for each in fields if each.default is not dataclasses.MISSING}
    return plain | {
        each.name: each.default_factory() for each in fields if each.default_factory is not dataclasses.MISSING
    }


def _check_keys(path: Path, where: str, found: dict[str, Any], valid: set[str]) -> None:
    for key in found:
        if key not in valid:
            raise UserError(
                f"{path} has the key {key!r}{where}, which this version of sparsepeft does not know; upgrade "
                "sparsepeft, or remove the key if you added it."
            )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the values in which two runs would train differently; only what ``now`` has is compared."""
    now = json.loads(json.dumps(now))  # tuples are lists, as in the file
    names: set[str] = set()
    # Columns follow from config and data; older runs say nothing of their backbone.
    passed_over = {"format_version", "columns"} | ({"backbone_fingerprint"} - before.keys())
    for part, values in now.items():
        old = before.get(part)
        if isinstance(values, dict) and isinstance(old, dict):
            keys = {**old, **values}.keys() - _NOT_TRAINED
            different = {key for key in keys if old.get(key) != values.get(key)}
            names |= {f"{key} (its content)" for key in different} if part == "data_fingerprints" else different
        elif values != old and part not in passed_over:
            names.add(part)
    return sorted(names)
