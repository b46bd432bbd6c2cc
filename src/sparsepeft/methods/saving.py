"""Saving the weights of a trained model, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsepeft.errors import RunFailed
from sparsepeft.models.quantized import cast_for_saving
from sparsepeft.tuners.config import TaskAdapterConfig

_Weights = dict[str, torch.Tensor]


def write_weights(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    save_dtype: str | None,
    state_dict: _Weights | None = None,
) -> int:
    """Save the trained weights into ``folder``, whole or not at all.

    An adapter is saved without the backbone and its tokenizer; a fully tuned model with everything. Where saving
    rounds, the model then has the rounded weights, so that it is scored as it will be read.

    Args:
        folder: of the files.
        model: with them.
        tokenizer: saved with a fully tuned model.
        save_dtype: see :class:`sparsepeft.training.RunConfig`.
        state_dict: the model's, where it is in parts (FSDP); then ``save_dtype`` has to be None.

    Returns:
        Bytes of the weight files.

    Raises:
        RunFailed: the files could not be written; what was in the folder is untouched.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if isinstance(model, PeftModel):
            _save_adapter(model, temporary, save_dtype, state_dict)
        else:
            _save_model(model, temporary, save_dtype, state_dict)
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


def round_weights(folder: Path, model: PreTrainedModel | PeftModel, save_dtype: str) -> None:
    """Give a model the values of its weights that were saved in ``folder`` in another dtype."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), "default", is_trainable=True)
        return
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    rounded = cast_for_saving(weights, save_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = rounded[name].to(parameter.dtype)


def _save_adapter(model: PeftModel, folder: Path, save_dtype: str | None, state_dict: _Weights | None) -> None:
    config = model.peft_config["default"]
    if isinstance(config, TaskAdapterConfig):
        config.save_dtype = save_dtype
    model.save_pretrained(str(folder), state_dict=state_dict)
    if save_dtype is None:
        return
    if not isinstance(config, TaskAdapterConfig):  # PEFT's own methods save what is in memory
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        save_file(cast_for_saving(load_file(weights), save_dtype), weights, metadata={"format": "pt"})
    round_weights(folder, model, save_dtype)


def _save_model(model: PreTrainedModel, folder: Path, save_dtype: str | None, state_dict: _Weights | None) -> None:
    if save_dtype is None:
        model.save_pretrained(str(folder), state_dict=state_dict)
        return
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    rounded = cast_for_saving(weights, save_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = rounded[name]
    model.save_pretrained(str(folder))
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    round_weights(folder, model, save_dtype)
