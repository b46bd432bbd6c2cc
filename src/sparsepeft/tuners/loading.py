"""From the tensors of an adapter's file to those of a model, inside PEFT's ``set_peft_model_state_dict``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsepeft.models.embeddings import embedding_layers
from sparsepeft.models.quantized import dequantize
from sparsepeft.tuners.files import fit_state_dict, plain_name, saved_names


def rename_for_loading(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A file's tensors under this model's names: the adapter's, and embeddings if PEFT has saved them with it.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape. Where only shapes are wrong it is raised when
            they are loaded: with ``ignore_mismatched_sizes=True`` PEFT leaves these tensors out before.
    """
    expected = saved_names(model, adapter_name)
    # PEFT has renamed already what `adapter_state_dict_load_map` lists.
    names = {plain_name(target): name for name, (target, _) in expected.items()}
    plain = {plain_name(key): tensor for key, tensor in state_dict.items()}
    given = dequantize({names.get(key, key): tensor for key, tensor in plain.items()})
    embeddings = _embedding_names(model)
    own = {key: tensor for key, tensor in given.items() if key not in embeddings}
    of_another_shape = {expected[key][0] for key, t in own.items() if key in expected and t.shape != expected[key][1]}
    refusals: dict[str, Callable[[], Any]] = {}
    if of_another_shape and own.keys() == expected.keys():
        refusals = dict.fromkeys(of_another_shape, partial(fit_state_dict, model, adapter_name, own))
        fitting = {expected[key][0]: tensor for key, tensor in own.items()}
    else:
        fitting = fit_state_dict(model, adapter_name, own)
    for key, (name, shape) in embeddings.items():
        if key in given:
            fitting[name] = given[key]
            if given[key].shape != shape:
                refusals[name] = partial(_refuse_embeddings, key, given[key].shape, shape)
    if refusals:
        _refuse_when_loaded(model, refusals)
    return fitting


def _embedding_names(model: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Name in a file (PEFT's prefix aside) -> name in the model and shape, of the embeddings' tensors."""
    found = {
        f"{layer}.{key}": tensor.shape
        for layer in embedding_layers(model)
        for key, tensor in model.get_submodule(layer).state_dict().items()
    }
    return {plain_name(name): (name, shape) for name, shape in found.items()}


def _refuse_embeddings(name: str, given: torch.Size, expected: torch.Size) -> None:
    raise ValueError(
        f"The adapter's file brings the embeddings {name!r} {list(given)}, but the model's are {list(expected)}; its "
        f"vocabulary was changed before training: call model.resize_token_embeddings({given[0]}) before loading it."
    )


def _refuse_when_loaded(model: nn.Module, refusals: dict[str, Callable[[], Any]]) -> None:
    """Once, call the refusal of each of these tensors that ``model.load_state_dict`` is given."""

    def check(module: nn.Module, state_dict: dict[str, torch.Tensor], *args: Any) -> None:
        handle.remove()
        for name, refuse in refusals.items():
            if name in state_dict:
                refuse()

    handle = model.register_load_state_dict_pre_hook(check)
