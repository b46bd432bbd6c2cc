"""An adapter's file: which tensors it holds and in which dtype, and loading them into a model."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load, save
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsepeft.folders import write_bytes
from sparsepeft.models.heads import HeadModule
from sparsepeft.models.identity import embedding_layers
from sparsepeft.models.quantized import cast_for_saving, dequantize
from sparsepeft.reprs import first_of
from sparsepeft.tuners.layer import TaskTunerLayer

PEFT_PREFIX = "base_model.model."


def fit_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a file's tensors to this model's; refuse a file that does not fit, naming all that is wrong with it.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; int8 ones lack their scales.
    """
    expected = saved_names(model, adapter_name)
    tensors = {plain_name(key): tensor for key, tensor in dequantize(state_dict).items()}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(tensors[key].shape)} instead of {list(expected[key][1])}"
            for key in sorted(expected.keys() & tensors.keys())
            if tensors[key].shape != expected[key][1]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {first_of(names, 4)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The saved tensors do not fit the adapter {adapter_name!r}, which its config describes: {listed}. The "
            "file is damaged or belongs to another config or model class; save the adapter again, or load the "
            "right folder."
        )
    return {expected[key][0]: tensor for key, tensor in tensors.items()}


def convert_saved(folder: Path, save_dtype: str | None, names: Collection[str]) -> None:
    """Give the tensors ``names`` of the file in an adapter's ``folder`` the dtype they are to be stored in.

    The file is replaced whole or not at all. In a checkpoint of ``Trainer`` it stays as it is: training that is resumed
    from it must go on as if it had not been interrupted.

    Raises:
        ValueError: a value would be lost; the file is left in full precision.
    """
    if save_dtype is None or _is_checkpoint(folder):
        return
    for path in _files(folder):
        tensors = read_tensors(path)
        adapter = {name: tensor for name, tensor in tensors.items() if plain_name(name) in names}
        write_tensors(path, tensors | cast_for_saving(adapter, save_dtype))


def newest_file(folder: Path) -> Path | None:
    """The file with an adapter's tensors in its ``folder``, of both kinds the one written last; None without any."""
    return max(_files(folder), key=lambda path: path.stat().st_mtime_ns, default=None)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What an adapter's file holds, safetensors or pickled."""
    content = path.read_bytes()
    if path.name != WEIGHTS_NAME:
        return load(content)
    pickled: dict[str, torch.Tensor] = torch.load(io.BytesIO(content), weights_only=True)
    return pickled


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace an adapter's file, whole or not at all."""
    if path.name != WEIGHTS_NAME:
        write_bytes(path, save(tensors, metadata={"format": "pt"}))
        return
    torch.save(tensors, buffer := io.BytesIO())
    write_bytes(path, buffer.getvalue())


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME) if path.is_file()]


def _is_checkpoint(folder: Path) -> bool:
    """Whether ``Trainer`` calls its checkpoints so; PEFT gives adapters not called "default" a folder inside."""
    return any(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", part) for part in folder.absolute().parts[-2:])


def own_names(model: nn.Module, adapter_name: str) -> frozenset[str]:
    """Names, in its file, of the tensors that are the adapter's and not those of a sparse model around it."""
    return frozenset(saved_names(model, adapter_name, (TaskTunerLayer, HeadModule)))


def saved_names(
    model: nn.Module,
    adapter_name: str,
    kinds: tuple[type[BaseTunerLayer | AuxiliaryTrainingWrapper], ...] = (BaseTunerLayer, AuxiliaryTrainingWrapper),
) -> dict[str, tuple[str, torch.Size]]:
    """What an adapter's file holds: name in the file (PEFT's prefix aside) -> name in the model's state and shape."""
    expected: dict[str, tuple[str, torch.Size]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        for container in module.adapter_layer_names:
            adapters = getattr(module, container)
            if adapter_name not in adapters:
                continue
            saved = name if isinstance(module, AuxiliaryTrainingWrapper) else f"{name}.{container}"
            for key, tensor in adapters[adapter_name].state_dict().items():
                target = f"{name}.{container}.{adapter_name}.{key}"
                expected[plain_name(f"{saved}.{key}")] = (target, tensor.shape)
    return expected


def plain_name(name: str) -> str:
    """A tensor's name whatever wraps the model and its layers: other adapters may extend other layers."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


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
    loaded = dequantize({names.get(key, key): tensor for key, tensor in plain.items()})
    embeddings = _embedding_names(model)
    tensors = {key: tensor for key, tensor in loaded.items() if key not in embeddings}
    of_another_shape = {
        expected[key][0] for key in tensors.keys() & expected.keys() if tensors[key].shape != expected[key][1]
    }
    refusals: dict[str, Callable[[], Any]] = {}
    if of_another_shape and tensors.keys() == expected.keys():
        refusals = dict.fromkeys(of_another_shape, partial(fit_state_dict, model, adapter_name, tensors))
        fitting = {expected[key][0]: tensor for key, tensor in tensors.items()}
    else:
        fitting = fit_state_dict(model, adapter_name, tensors)
    for key, (name, shape) in embeddings.items():
        if key in loaded:
            fitting[name] = loaded[key]
            if loaded[key].shape != shape:
                refusals[name] = partial(_refuse_embeddings, key, loaded[key].shape, shape)
    if refusals:
        _refuse_when_loaded(model, refusals)
    return fitting


def _embedding_names(model: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Name in a file (PEFT's prefix aside) -> name in the model and shape, of the embeddings' tensors."""
    shapes = {
        f"{layer}.{key}": tensor.shape
        for layer in embedding_layers(model)
        for key, tensor in model.get_submodule(layer).state_dict().items()
    }
    return {plain_name(name): (name, shape) for name, shape in shapes.items()}


def _refuse_embeddings(name: str, shape: torch.Size, expected: torch.Size) -> None:
    raise ValueError(
        f"The adapter's file brings the embeddings {name!r} {list(shape)}, but the model's are {list(expected)}; its "
        f"vocabulary was changed before training: call model.resize_token_embeddings({shape[0]}) before loading it."
    )


def _refuse_when_loaded(model: nn.Module, refusals: dict[str, Callable[[], Any]]) -> None:
    """Once, call the refusal of each of these tensors that ``model.load_state_dict`` is given."""

    def check(module: nn.Module, state_dict: dict[str, torch.Tensor], *args: Any) -> None:
        handle.remove()
        for name, refuse in refusals.items():
            if name in state_dict:
                refuse()

    handle = model.register_load_state_dict_pre_hook(check)
