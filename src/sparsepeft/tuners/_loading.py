"""From the tensors of an adapter's file to those of a model, inside PEFT's ``set_peft_model_state_dict``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsepeft.tuners._embeddings import embedding_layers
from sparsepeft.tuners._files import PEFT_PREFIX, fit_state_dict, saved_names
from sparsepeft.tuners._quantized import dequantize


def rename_for_loading(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A file's tensors under this model's names; embeddings, which PEFT may have saved with them, as they are.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape. Where only shapes are wrong it is raised when
            they are loaded: with ``ignore_mismatched_sizes=True`` PEFT leaves these tensors out before.
    """
    expected = saved_names(model, adapter_name)
    # PEFT has renamed already what the head of a bare transformers model lists in `adapter_state_dict_load_map`.
    names = {target: name for name, (target, _) in expected.items()}
    plain = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in state_dict.items()}
    given = dequantize({names.get(key, key): tensor for key, tensor in plain.items()})
    embeddings = _embedding_names(model)
    own = {key: tensor for key, tensor in given.items() if key not in embeddings}
    of_another_shape = {expected[key][0] for key, t in own.items() if key in expected and t.shape != expected[key][1]}
    if of_another_shape and own.keys() == expected.keys():
        _check_when_loaded(model, adapter_name, own, of_another_shape)
        fitting = {expected[key][0]: tensor for key, tensor in own.items()}
    else:
        fitting = fit_state_dict(model, adapter_name, own)
    return fitting | {embeddings[key]: tensor for key, tensor in given.items() if key in embeddings}


def _embedding_names(model: nn.Module) -> dict[str, str]:
    """Name in a file (PEFT's prefix aside) -> name in the model, of the embeddings' tensors."""
    names = [f"{layer}.{key}" for layer in embedding_layers(model) for key in model.get_submodule(layer).state_dict()]
    return {name.removeprefix(PEFT_PREFIX): name for name in names}


def _check_when_loaded(
    model: nn.Module, adapter_name: str, given: dict[str, torch.Tensor], of_another_shape: set[str]
) -> None:
    """Refuse what is given if ``model.load_state_dict`` is called with any of the tensors of another shape."""

    def check(module: nn.Module, state_dict: dict[str, torch.Tensor], *args: Any) -> None:
        handle.remove()
        if of_another_shape & state_dict.keys():
            fit_state_dict(model, adapter_name, given)

    handle = model.register_load_state_dict_pre_hook(check)
