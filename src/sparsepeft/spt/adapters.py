"""Files of adapters that PEFT's own methods leave on a sparse model: loaded on a dense one, they say so.

PEFT takes from a file what a model has a place for, and drops the rest without a word. So

- tensors inside a routed FFN, whose neurons are in another order than the dense FFN's, are stored under the dense
  model's names with a dimension more: PEFT refuses them there for their shape;
- all others fit a dense model as well, and may be meant for it: ``exclude_modules`` names a module that only a sparse
  model has, so PEFT warns where there is none, and the card says how to load them.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load, save
from torch import Tensor, nn

from sparsepeft.models.context import ForwardContext
from sparsepeft.models.feed_forwards import FeedForward
from sparsepeft.provenance import write_bytes, write_json
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.state import SptState
from sparsepeft.tuners.card import write_card
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.files import PEFT_PREFIX

SETTINGS = "spt_settings"
FeedForwards = list[tuple[FeedForward, RoutedFeedForward]]


class SparseSettings(SptState):
    """A sparse model's settings, which every adapter saves: the place where one learns that an adapter is saved.

    Args:
        model: the sparse model.
        feed_forwards: its routed FFNs, and what they replaced.
        module: the settings.
        context: of the sparse model.
    """

    def __init__(
        self, model: nn.Module, feed_forwards: FeedForwards, module: nn.Module, context: ForwardContext
    ) -> None:
        super().__init__(module, context)
        self._model = (model,)  # in a tuple, or torch would register the model as a part of itself
        self._feed_forwards = feed_forwards
        self._hook = model.register_load_state_dict_pre_hook(_before_loading)

    def detach(self) -> None:
        """Let the model load state dicts as they are again."""
        self._hook.remove()

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """What is saved with an adapter. PEFT writes the adapter's config next."""
        config = getattr(self._model[0], "peft_config", {}).get(adapter_name)
        if isinstance(config, PeftConfig) and not isinstance(config, TaskAdapterConfig):  # these know their backbone
            # On this object, once: only the config is told which folder it is.
            config.save_pretrained = partial(_save_once, config, self.dense_names())  # type: ignore[method-assign]
        return super().adapter_state_dict(adapter_name, state_dict)

    def dense_names(self) -> dict[str, str]:
        """What the names of a routed FFN's projections begin with: in the sparse model -> in the dense one."""
        paths = {module: name for name, module in self._model[0].named_modules()}
        return {
            f"{paths[routed]}.{projection}.": f"{feed_forward.name}.{projection}."
            for feed_forward, routed in self._feed_forwards
            for projection in feed_forward.names[:3]
            if projection is not None
        }


def _save_once(config: PeftConfig, dense_names: dict[str, str], save_directory: str, **kwargs: Any) -> None:
    """``PeftConfig.save_pretrained`` of an adapter whose tensors are those of a sparse model."""
    del config.save_pretrained
    config.save_pretrained(save_directory, **kwargs)
    folder = Path(save_directory)
    write_card(folder, config, is_sparse=True)
    values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if "exclude_modules" in values:
        excluded = values["exclude_modules"] or []
        values["exclude_modules"] = (
            f"({excluded})|{SETTINGS}" if isinstance(excluded, str) else sorted({*excluded, SETTINGS})
        )
        write_json(folder / CONFIG_NAME, values)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        tensors = load(path.read_bytes())
        write_bytes(path, save(_marked(tensors, dense_names), metadata={"format": "pt"}))


def _marked(tensors: dict[str, Tensor], dense_names: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        sparse = next((sparse for sparse in dense_names if name.startswith(sparse)), None)
        if sparse is None:
            result[key] = tensor
        else:
            result[PEFT_PREFIX + dense_names[sparse] + name.removeprefix(sparse)] = tensor[None]
    return result


def _before_loading(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Undo in a state dict, in place, what :func:`_marked` did to a file."""
    settings: Any = model.get_submodule(SETTINGS)
    begin, end = f"{prefix}{SETTINGS}.modules_to_save.", ".settings"
    adapters = [key[len(begin) : -len(end)] for key in state_dict if key.startswith(begin) and key.endswith(end)]
    own = {f"{prefix}{name}": parameter.dim() for name, parameter in model.named_parameters()}
    for sparse, dense in settings.dense_names().items():
        for key in [key for key in state_dict if key.startswith(prefix + dense)]:
            name = prefix + sparse + key.removeprefix(prefix + dense)
            module, _, parameter = name.rpartition(".")
            # PEFT has put in the adapter's name, but not where it found no module of the dense model's name.
            for target in (name, *(f"{module}.{adapter}.{parameter}" for adapter in adapters)):
                if state_dict[key].dim() == own.get(target, 0) + 1:
                    state_dict[target] = state_dict.pop(key)[0]
                    break
