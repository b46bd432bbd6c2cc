"""The files of a run's folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.tasks import TaskData, TaskSpec
from sparsepeft.training.config import RunConfig
from sparsepeft.tuners._quantized import cast_for_saving
from sparsepeft.tuners.config import TaskAdapterConfig

RUN, RESULTS, CHECKPOINTS = "run.json", "results.json", "checkpoints"
RESULTS_VERSION = 1


def write_weights(
    folder: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, save_dtype: str | None
) -> int:
    """Save the trained weights into ``folder``, whole or not at all.

    An adapter is saved without the backbone and its tokenizer; a fully tuned model with everything.

    Returns:
        Bytes of the weight files.

    Raises:
        RunFailed: the files could not be written; what was in the folder is untouched.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if isinstance(model, PeftModel):
            config = model.peft_config["default"]
            if isinstance(config, TaskAdapterConfig):
                config.save_dtype = save_dtype
            model.save_pretrained(str(temporary))
            if not isinstance(config, TaskAdapterConfig) and save_dtype is not None:
                # PEFT's own methods save what is in memory.
                weights = temporary / SAFETENSORS_WEIGHTS_NAME
                save_file(cast_for_saving(load_file(weights), save_dtype), weights, metadata={"format": "pt"})
        else:
            dtype = getattr(torch, save_dtype) if save_dtype else None
            if dtype is not None:
                model.to(dtype)
            model.save_pretrained(str(temporary))
            tokenizer.save_pretrained(str(temporary))
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise RunFailed(
            f"The trained weights could not be written to {folder} ({error}); free space and resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run's folder.

    Raises:
        UserError: this is no run's folder, or the file is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise UserError(f"{folder} holds no run ({RUN} is missing); pass the --output-dir of `sparsepeft train`.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train again with --overwrite.") from error
    return content


def prepare_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """See that a run may start, or go on, in ``folder``; with ``overwrite`` throw away what is there.

    Raises:
        UserError: the folder holds a finished run, an unfinished one of another config, or is a file.
    """
    if folder.is_file():
        raise UserError(f"The output folder {folder} is a file; pass a folder to --output-dir.")
    if not (folder / RUN).exists():
        return
    if overwrite:
        for name in (RESULTS, RUN):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return
    if (folder / RESULTS).exists():
        raise UserError(
            f"{folder} already holds a finished run; pass another --output-dir, or --overwrite to replace that run."
        )
    before, now = read_run(folder)["config"], json.loads(json.dumps(config))  # tuples are lists, as in the file
    differing = sorted(key for key in now if key != "output_dir" and before.get(key) != now[key])
    if differing:
        raise UserError(
            f"{folder} holds an unfinished run with other values of {', '.join(differing)}; repeat its command to "
            "resume it, pass another --output-dir, or --overwrite to start anew."
        )


def spec_of(run: dict[str, Any]) -> TaskSpec:
    """The task a run was trained on, from its ``run.json``."""
    values = dict(run["task"])
    for name in ("text_columns", "label_names", "metrics"):
        values[name] = tuple(values[name]) if values[name] is not None else None
    return TaskSpec(**values)


def results_of(
    config: RunConfig, data: TaskData, metrics: dict[str, dict[str, float]], **measured: Any
) -> dict[str, Any]:
    """The content of ``results.json``.

    ``score`` is the main metric on the test part if there is one, or else on what was
    scored (the validation set, or the part of the training data that ``score_on`` asked for).
    """
    split = next(name for name in ("test", "validation", "selection") if name in metrics)
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
        "config": {k: v for k, v in config.to_dict().items() if k not in ("output_dir", "data_dir", "model")},
    }
