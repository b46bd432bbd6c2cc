"""What a sparse model's files hold: its own checkpoints, and those of adapters trained on it.

A model's ``save_pretrained`` writes weights under their dense names and in the order from before, so that
``from_pretrained`` loads the dense model; routers, codebooks and settings are beside them, under names that begin with
``spt.``. The sparse model's ``load_state_dict`` takes such weights (a resumed training does), a dense model's, and
those of its own ``state_dict()``.

An adapter of PEFT's own methods says in its files what it was trained on, since PEFT takes from a file what a model has
a place for, and drops the rest without a word. So

- tensors inside an FFN are stored under the dense model's names; those of a routed one, whose neurons are in another
  order than the dense FFN's, with a dimension more: PEFT refuses them there for their shape;
- all others fit a dense model as well, and may be meant for it: ``exclude_modules`` names a module that only a sparse
  model has, so PEFT warns where there is none, and the card says how to load them. Where only FFNs with exact values
  are sparse, the adapter is the dense model's, and there is nothing to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.folders import write_json
from sparsepeft.models.blocks import unwrap
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.sublayers import FeedForward
from sparsepeft.spt.attention import SparseAttention
from sparsepeft.spt.feed_forward import ExactFeedForward, SparseFeedForward
from sparsepeft.spt.names import check_names, with_dense_names
from sparsepeft.spt.projections import inner_dims
from sparsepeft.spt.state import SptState
from sparsepeft.tuners.card import write_card
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.files import PEFT_PREFIX, newest_file, plain_name, read_tensors, write_tensors

FeedForwards = list[tuple[FeedForward, SparseFeedForward]]
SETTINGS = "spt_settings"
_ADDED, _OWN = "spt.", "original_module."  # before an added tensor's name in a checkpoint; in SptState's


def save_densely(model: PreTrainedModel, feed_forwards: FeedForwards) -> RemovableHandle:
    """Make a sparse model save and load dense weights, as this module's docstring says.

    Returns:
        What undoes the loading; ``del model.save_pretrained`` undoes the saving.
    """
    # On this instance alone: transformers has no hook for what a model saves.
    model.save_pretrained = partial(_save, model, feed_forwards)  # type: ignore[method-assign]
    return model.register_load_state_dict_pre_hook(partial(_take_dense_weights, feed_forwards))


def added_tensors(folder: Path) -> dict[str, Tensor]:
    """What ``save_pretrained`` of a sparse model put beside the weights, by its name in the model."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_ADDED)]  # noqa: SIM118 - no mapping
            tensors |= {name.removeprefix(_ADDED): file.get_tensor(name) for name in names}
    return tensors


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
    is_adapter = _is_injected(model)
    if not is_adapter:
        state_dict = _dense(model, feed_forwards, state_dict or model.state_dict())
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
    if is_adapter and is_main_process:
        settings: Any = model.get_submodule(SETTINGS)
        settings.mark(Path(save_directory), model.active_adapters()[0])


def _is_injected(model: nn.Module) -> bool:
    """Whether transformers has put adapters into the model, and saves these alone."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@torch.no_grad()
def _dense(model: nn.Module, feed_forwards: FeedForwards, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense model's state dict, with what was added, from the sparse model's."""
    added = tuple(f"{name}.{_OWN}" for name, module in model.named_modules() if isinstance(module, SptState))
    weights = {
        sparse: (dense, dim, routed)
        for feed_forward, routed in feed_forwards
        for sparse, dense, dim in _weights(feed_forward, routed)
    }
    result = {}
    for key, tensor in state_dict.items():
        if key in weights:
            dense, dim, routed = weights[key]
            order = routed.neuron_order
            result[dense] = _ordered(tensor, dim, None if order is None else torch.argsort(order))
        else:
            result[f"{_ADDED}{key.replace(_OWN, '')}" if key.startswith(added) else key] = tensor
    return result


@torch.no_grad()
def _take_dense_weights(
    feed_forwards: FeedForwards, model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Turn a dense state dict into the sparse model's, in place."""
    for feed_forward, routed in feed_forwards:
        router = f"{feed_forward.routed_name}.spt_router."
        if any(key.startswith(f"{prefix}{router}{_OWN}") for key in state_dict):
            continue  # the sparse model's own
        order = state_dict.get(f"{prefix}{_ADDED}{router}neuron_order", routed.neuron_order)
        for sparse, dense, dim in _weights(feed_forward, routed):
            if prefix + dense in state_dict:
                state_dict[prefix + sparse] = _ordered(state_dict.pop(prefix + dense), dim, order)
    for name, module in model.named_modules():
        for key in module.original_module.state_dict() if isinstance(module, SptState) else ():
            if f"{prefix}{_ADDED}{name}.{key}" in state_dict:
                state_dict[f"{prefix}{name}.{_OWN}{key}"] = state_dict.pop(f"{prefix}{_ADDED}{name}.{key}")


def _weights(feed_forward: FeedForward, routed: SparseFeedForward) -> Iterator[tuple[str, str, int | None]]:
    """Of each parameter of an FFN: its name in the sparse and in the dense model, and its inner dimension if any."""
    for name in feed_forward.projection_names:
        linear = unwrap(routed.get_submodule(name))
        dims = inner_dims(linear, is_output=name != feed_forward.names.down)
        for part, _ in linear.named_parameters():
            yield f"{feed_forward.routed_name}.{name}.{part}", f"{feed_forward.name}.{name}.{part}", dims.get(part)


def _ordered(tensor: Tensor, dim: int | None, order: Tensor | None) -> Tensor:
    return tensor if dim is None or order is None else tensor.index_select(dim, order.to(tensor.device))


class SparseSettings(SptState):
    """A sparse model's settings, saved with every adapter; PEFT's call for them tells that an adapter is being saved.

    Args:
        model: the sparse model.
        feed_forwards: its sparse FFNs, and what they replaced.
        module: the settings.
        context: of the sparse model.
    """

    def __init__(
        self, model: nn.Module, feed_forwards: FeedForwards, module: nn.Module, context: ForwardContext
    ) -> None:
        super().__init__(module, context)
        self._model = (model,)  # in a tuple, or torch would register the model as a part of itself
        self._feed_forwards = feed_forwards
        self._checked: list[PeftConfig] = []
        self._hooks = [
            model.register_load_state_dict_pre_hook(_unmark),
            model.register_forward_pre_hook(_check_names),  # PEFT shows no config before it has put the adapter in
        ]

    def detach(self) -> None:
        """Remove what was put on the model and its configs, which become those of adapters on the dense model."""
        for hook in self._hooks:
            hook.remove()
        names = _moved(self.dense_names())
        for config in self._configs.values():
            vars(config).pop("save_pretrained", None)
            vars(config).update(with_dense_names(vars(config), names))

    def mark(self, folder: Path, adapter_name: str) -> None:
        """Say in the files that transformers has written of an adapter what it was trained on."""
        config = self._configs.get(adapter_name)
        if config is not None:
            _mark(folder, config, self.dense_names(), self._fits_dense)

    def check_names(self) -> None:
        """See that adapters extend what they would extend in the dense model, see :mod:`sparsepeft.spt.names`."""
        for config in self._configs.values():
            if not any(config is checked for checked in self._checked):
                check_names(config, _moved(self.dense_names()))
                self._checked.append(config)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """What is saved with an adapter. PEFT writes the adapter's config next, if it saves anything."""
        config = self._configs.get(adapter_name)
        if config is not None and not _is_injected(self._model[0]):
            # On this object, once: only the config is told which folder it is.
            save = partial(_save_once, config, self.dense_names(), self._fits_dense)
            config.save_pretrained = save  # type: ignore[method-assign]
        return super().adapter_state_dict(adapter_name, state_dict)

    @property
    def _configs(self) -> dict[str, PeftConfig]:
        """Of the adapters whose methods do not know their backbone."""
        configs = getattr(self._model[0], "peft_config", {})
        return {
            name: config
            for name, config in configs.items()
            if isinstance(config, PeftConfig) and not isinstance(config, TaskAdapterConfig)
        }

    @property
    def _fits_dense(self) -> bool:
        """Whether adapters answer in the dense model as they do here."""
        has_attention = any(isinstance(module, SparseAttention) for module in self._model[0].modules())
        return not has_attention and all(isinstance(sparse, ExactFeedForward) for _, sparse in self._feed_forwards)

    def dense_names(self) -> dict[str, tuple[str, bool]]:
        """What the names of a sparse FFN's projections begin with: in the sparse model -> in the dense one.

        And whether its neurons are in another order there.
        """
        paths = {module: name for name, module in self._model[0].named_modules()}
        return {
            f"{paths[sparse]}.{projection}.": (f"{feed_forward.name}.{projection}.", sparse.neuron_order is not None)
            for feed_forward, sparse in self._feed_forwards
            for projection in feed_forward.names[:3]
            if projection is not None
        }


def _check_names(model: nn.Module, args: Any) -> None:
    settings: Any = model.get_submodule(SETTINGS)
    settings.check_names()


def _save_once(
    config: PeftConfig, dense_names: dict[str, tuple[str, bool]], fits_dense: bool, save_directory: str, **kwargs: Any
) -> None:
    """``PeftConfig.save_pretrained`` of an adapter whose tensors are those of a sparse model."""
    vars(config).pop("save_pretrained", None)
    config.save_pretrained(save_directory, **kwargs)
    _mark(Path(save_directory), config, dense_names, fits_dense)


def _mark(folder: Path, config: PeftConfig, dense_names: dict[str, tuple[str, bool]], fits_dense: bool) -> None:
    """Say in an adapter's files that it was trained on a sparse model, as this module's docstring says."""
    file = newest_file(folder)
    tensors = {} if file is None else read_tensors(file)
    # Code that only asked for the tensors, as for a running mean, has saved nothing, and by now the config may be that
    # of a dense model. A file tells, since it has the settings.
    if file is not None and f"{SETTINGS}.settings" not in map(plain_name, tensors):
        return
    values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if not fits_dense:
        write_card(folder, config, is_sparse=True)
    values |= with_dense_names(values, _moved(dense_names))
    if "exclude_modules" in values and not fits_dense:
        excluded = values["exclude_modules"] or []
        values["exclude_modules"] = (
            f"({excluded})|{SETTINGS}" if isinstance(excluded, str) else sorted({*excluded, SETTINGS})
        )
    write_json(folder / CONFIG_NAME, values)
    if file is not None:
        write_tensors(file, _marked(tensors, dense_names))


def _moved(dense_names: dict[str, tuple[str, bool]]) -> dict[str, str]:
    """The projections that have another name in the sparse model: theirs there -> in the dense one."""
    return {sparse[:-1]: dense[:-1] for sparse, (dense, _) in dense_names.items() if sparse != dense}


def _marked(tensors: dict[str, Tensor], dense_names: dict[str, tuple[str, bool]]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        sparse = next((sparse for sparse in dense_names if name.startswith(sparse)), None)
        if sparse is None:
            result[key] = tensor
        else:
            dense, is_reordered = dense_names[sparse]
            result[PEFT_PREFIX + dense + name.removeprefix(sparse)] = tensor[None] if is_reordered else tensor
    return result


def _unmark(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Undo in a state dict, in place, what :func:`_marked` did to a file."""
    settings: Any = model.get_submodule(SETTINGS)
    begin, end = f"{prefix}{SETTINGS}.modules_to_save.", ".settings"
    adapters = [key[len(begin) : -len(end)] for key in state_dict if key.startswith(begin) and key.endswith(end)]
    dims = {f"{prefix}{name}": parameter.dim() for name, parameter in model.named_parameters()}
    for sparse, (dense, is_reordered) in settings.dense_names().items():
        if sparse == dense and not is_reordered:
            continue
        for key in [key for key in state_dict if key.startswith(prefix + dense)]:
            name = prefix + sparse + key.removeprefix(prefix + dense)
            module, _, parameter = name.rpartition(".")
            # PEFT has put in the adapter's name, but not where it found no module of the dense model's name.
            for target in (name, *(f"{module}.{adapter}.{parameter}" for adapter in adapters)):
                if target in dims and state_dict[key].dim() == dims[target] + is_reordered:
                    tensor = state_dict.pop(key)
                    state_dict[target] = tensor[0] if is_reordered else tensor
                    break
