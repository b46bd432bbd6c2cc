"""Whether a saved adapter stands on the backbone it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

_NUM_TENSORS = 24
_NUM_VALUES = 8


def backbone_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of the bare model, through PEFT's wrappers and accelerate's offloading."""
    for full_name, parent, name, parameter in _parameters(module, prefix):
        yield full_name, parameter if parameter.device.type != "meta" else _offloaded(parent, name, parameter)


def _parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Full name, module, name in it and tensor of every parameter of the bare model."""
    if not getattr(module, "is_backbone", True):
        return  # an adapter's own, without being a PEFT layer
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, module, name, parameter
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.")


def _offloaded(module: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The value that accelerate keeps elsewhere for a parameter on the meta device; the parameter if there is none."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return parameter


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether transformers read this tensor from a checkpoint (rather than initialising it)."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the tensor is stored in a quantized form (an integer tensor or a tensor subclass)."""
    return type(parameter) not in (nn.Parameter, torch.Tensor) or not parameter.is_floating_point()


def fingerprint(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Any]:
    """Sampled values of the tensors that make up the backbone.

    Args:
        model: the bare or the adapted model; offloaded tensors are fetched where accelerate's hooks say how.
        exclude: names of modules that are no part of the backbone (the head).

    Returns:
        ``{"dtype": str, "quantized": bool, "tensors": {name: {"shape": [...], "values": [...]}}}``, a few kilobytes.
        Names leave out the model class's own prefix, so that ``BertModel`` and ``BertForSequenceClassification``
        of one checkpoint agree.
    """
    named = _comparable(model, exclude)
    plain = {
        name: tensor for name, tensor in named.items() if not is_quantized(tensor) and tensor.device.type != "meta"
    }
    names = sorted(plain)
    step = max(1, len(names) // _NUM_TENSORS)
    chosen = names[::step][:_NUM_TENSORS]
    return {
        "dtype": str(next(iter(plain.values())).dtype).removeprefix("torch.") if plain else "unknown",
        "quantized": len(plain) < len(named),
        "tensors": {name: {"shape": list(plain[name].shape), "values": _sample(plain[name])} for name in chosen},
    }


def check_fingerprint(
    expected: dict[str, Any], model: nn.Module, exclude: Iterable[str], expected_name: str, found_name: str
) -> None:
    """Raise unless ``model`` is the backbone that ``expected`` was taken from.

    Values are compared within the coarser of the two dtypes' resolution. Quantized tensors cannot be compared; a
    warning says so.

    Raises:
        ValueError: another backbone, naming both and the override.
    """
    named = _comparable(model, exclude)
    compared = 0
    for name, saved in expected["tensors"].items():
        tensor = named.get(name)
        if tensor is not None and (is_quantized(tensor) or tensor.device.type == "meta"):
            continue
        if (
            tensor is None
            or list(tensor.shape) != saved["shape"]
            or not _close(tensor, saved["values"], expected["dtype"])
        ):
            raise ValueError(
                f"This adapter was trained on the backbone {expected_name!r}, but it is being attached to "
                f"{found_name!r}, whose tensor {name!r} {_difference(tensor, saved)}; load the right backbone, or set "
                "check_backbone=False in the adapter's config (PeftConfig.from_pretrained) and pass that config, if "
                "you know that it fits."
            )
        compared += 1
    if compared < len(expected["tensors"]) or expected["quantized"]:
        warnings.warn(
            f"The backbone {found_name!r} is quantized or offloaded (here or when the adapter was trained): only "
            f"{compared} sampled tensors could be compared, so make sure that it is the model the adapter was trained "
            "on.",
            UserWarning,
            stacklevel=2,
        )


def _comparable(model: nn.Module, exclude: Iterable[str]) -> dict[str, torch.Tensor]:
    """The backbone's tensors by class-independent name: those read from the checkpoint, if any were."""
    excluded = tuple(f"{name}." for name in exclude)
    named = {n: p for n, p in backbone_parameters(model) if not (excluded and n.startswith(excluded)) and p.numel()}
    if any(is_loaded(p) for p in named.values()):
        # Offloading and quantizing make new tensors, so whether one was loaded is only known of those that stayed.
        offloaded = {n for n, _, _, p in _parameters(model) if p.device.type == "meta"}
        named = {n: p for n, p in named.items() if is_loaded(p) or n in offloaded or is_quantized(p)}
    prefix = getattr(model, "base_model_prefix", "") or ""
    return {n.removeprefix(f"{prefix}."): p for n, p in named.items()}


def _sample(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_NUM_VALUES, flat.numel()), device=flat.device).long()
    return [float(value) for value in flat[index].to("cpu", torch.float64)]


def _close(tensor: torch.Tensor, values: list[float], dtype: str) -> bool:
    saved_dtype = getattr(torch, dtype, torch.float32)
    resolution = max(torch.finfo(tensor.dtype).eps, torch.finfo(saved_dtype).eps)
    found, saved = torch.tensor(_sample(tensor)), torch.tensor(values)
    return torch.allclose(found, saved, rtol=2 * resolution, atol=1e-6)


def _difference(tensor: torch.Tensor | None, saved: dict[str, Any]) -> str:
    if tensor is None:
        return "is missing"
    if list(tensor.shape) != saved["shape"]:
        return f"has shape {list(tensor.shape)} instead of {saved['shape']}"
    return "has other values"
