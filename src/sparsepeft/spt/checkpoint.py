"""A sparse model's own checkpoints: those of the dense model, with what was added to it beside the weights.

``save_pretrained`` writes weights under their dense names and in the order from before, so that ``from_pretrained``
loads the dense model; routers, codebooks and settings are beside them, under names that begin with ``spt.``. The sparse
model's ``load_state_dict`` takes such weights (a resumed training does), a dense model's, and those of its own
``state_dict()``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.models.blocks import unwrap
from sparsepeft.models.feed_forwards import FeedForward
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.projections import inner_dims
from sparsepeft.spt.state import SptState

FeedForwards = list[tuple[FeedForward, RoutedFeedForward]]
_ADDED, _OWN = "spt.", "original_module."  # before an added tensor's name in a checkpoint; in SptState's


def save_densely(model: PreTrainedModel, feed_forwards: FeedForwards) -> RemovableHandle:
    """From now on let a sparse model save and load as this module says.

    Returns:
        What undoes the loading; ``del model.save_pretrained`` undoes the saving.
    """
    # On this instance alone: transformers asks nobody what a model saves.
    model.save_pretrained = functools.partial(_save, model, feed_forwards)  # type: ignore[method-assign]
    return model.register_load_state_dict_pre_hook(functools.partial(_before_loading, feed_forwards))


def added_tensors(folder: Path) -> dict[str, Tensor]:
    """What ``save_pretrained`` of a sparse model put beside the weights, by its name in the model."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_ADDED)]  # noqa: SIM118 - no mapping
            found |= {name.removeprefix(_ADDED): file.get_tensor(name) for name in names}
    return found


def _save(
    model: PreTrainedModel,
    feed_forwards: FeedForwards,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """``PreTrainedModel.save_pretrained``."""
    if not getattr(model, "_hf_peft_config_loaded", False):  # else it is adapters that are saved
        state_dict = _dense(model, feed_forwards, state_dict or model.state_dict())
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)


@torch.no_grad()
def _dense(model: nn.Module, feed_forwards: FeedForwards, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense model's state dict, with what was added, from the sparse model's."""
    added = tuple(f"{name}.{_OWN}" for name, module in model.named_modules() if isinstance(module, SptState))
    weights = {
        sparse: (dense, dim, routed)
        for feed_forward, routed in feed_forwards
        for sparse, dense, dim in _weights(feed_forward, routed)
    }
    found = {}
    for key, tensor in state_dict.items():
        if key in weights:
            dense, dim, routed = weights[key]
            found[dense] = _ordered(tensor, dim, torch.argsort(routed.spt_router.original_module.neuron_order))
        else:
            found[f"{_ADDED}{key.replace(_OWN, '')}" if key.startswith(added) else key] = tensor
    return found


@torch.no_grad()
def _before_loading(
    feed_forwards: FeedForwards, model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Turn a dense state dict into the sparse model's, in place."""
    for feed_forward, routed in feed_forwards:
        router = f"{feed_forward.routed_name}.spt_router."
        if any(key.startswith(f"{prefix}{router}{_OWN}") for key in state_dict):
            continue  # the sparse model's own
        order = state_dict.get(f"{prefix}{_ADDED}{router}neuron_order", routed.spt_router.original_module.neuron_order)
        for sparse, dense, dim in _weights(feed_forward, routed):
            if prefix + dense in state_dict:
                state_dict[prefix + sparse] = _ordered(state_dict.pop(prefix + dense), dim, order)
    for name, module in model.named_modules():
        for key in module.original_module.state_dict() if isinstance(module, SptState) else ():
            if f"{prefix}{_ADDED}{name}.{key}" in state_dict:
                state_dict[f"{prefix}{name}.{_OWN}{key}"] = state_dict.pop(f"{prefix}{_ADDED}{name}.{key}")


def _weights(feed_forward: FeedForward, routed: RoutedFeedForward) -> Iterator[tuple[str, str, int | None]]:
    """Of each parameter of an FFN: its name in the sparse and in the dense model, and its inner dimension if any."""
    for name in feed_forward.projection_names:
        linear = unwrap(routed.get_submodule(name))
        dims = inner_dims(linear, is_output=name != feed_forward.names.down)
        for part, _ in linear.named_parameters():
            yield f"{feed_forward.routed_name}.{name}.{part}", f"{feed_forward.name}.{name}.{part}", dims.get(part)


def _ordered(tensor: Tensor, dim: int | None, order: Tensor) -> Tensor:
    return tensor if dim is None else tensor.index_select(dim, order.to(tensor.device))
