"""Which tensors an adapter's file must hold, and what is said when it does not."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sparsepeft.tuners._quantized import dequantize

PEFT_PREFIX = "base_model.model."


def fit_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a file's tensors to this model's; refuse a file that does not fit, naming all that is wrong with it.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; int8 ones lack their scales.
    """
    expected = saved_names(model, adapter_name)
    found = {_plain(key): tensor for key, tensor in dequantize(state_dict).items()}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(found[key].shape)} instead of {list(expected[key][1])}"
            for key in sorted(expected.keys() & found.keys())
            if found[key].shape != expected[key][1]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_shorten(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The saved tensors do not fit the adapter {adapter_name!r}, which its config describes: {listed}. The "
            "file is damaged or belongs to another config or model class; save the adapter again, or load the "
            "right folder."
        )
    return {expected[key][0]: tensor for key, tensor in found.items()}


def saved_names(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, torch.Size]]:
    """What an adapter's file holds: name in the file (PEFT's prefix aside) -> name in the model's state and shape."""
    expected: dict[str, tuple[str, torch.Size]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for container in module.adapter_layer_names:
            own = getattr(module, container)
            if adapter_name not in own:
                continue
            saved = f"{name}.{container}"
            if isinstance(module, AuxiliaryTrainingWrapper):
                is_mapped = bool(module.adapter_state_dict_load_map(adapter_name))
                saved = f"{saved}.{adapter_name}" if is_mapped else name  # PEFT has put it back already
            for key, tensor in own[adapter_name].state_dict().items():
                target = f"{name}.{container}.{adapter_name}.{key}"
                expected[_plain(f"{saved}.{key}")] = (target, tensor.shape)
    return expected


def _plain(name: str) -> str:
    """A tensor's name whatever wraps the model and its layers: other adapters may extend other layers."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _shorten(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
