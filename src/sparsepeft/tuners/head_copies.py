"""Copies of a head's modules, to be trained: with the values that are offloaded or quantized in the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type
from torch import nn

from sparsepeft.models.identity import backbone_parameters, is_quantized


def move_unless_meta(module: nn.Module, device: torch.device | None) -> nn.Module:
    """``module`` on ``device``; where it has no storage yet (``low_cpu_mem_usage``), as it is."""
    has_storage = all(parameter.device.type != "meta" for parameter in module.parameters())
    return module.to(device) if has_storage and device is not None else module


def check_copyable(module: nn.Module, name: str) -> None:
    """Refuse a head that was quantized by a library whose layers cannot be turned into ordinary ones here.

    Args:
        module: a module of the head.
        name: its name in the model.

    Raises:
        ValueError: it has such a layer.
    """
    for inner, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        is_linear = hasattr(layer, "in_features") and hasattr(layer, "out_features")
        is_plain = isinstance(weight, torch.Tensor) and not _is_quantized(weight)
        if is_linear and not is_plain and not (isinstance(layer, nn.Linear) and _can_dequantize(layer.weight)):
            raise ValueError(
                f"The head's layer {f'{name}.{inner}'.rstrip('.')!r} was quantized as {type(layer).__name__}, but a "
                "head is trained in full precision, and only layers of bitsandbytes, torchao and Quanto can be turned "
                "back; leave the head out when quantizing (such as by modules_to_not_convert), or use "
                "head_type='linear'."
            )


def _is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight has to be decoded before it is trained; float8 needs scales that its layer keeps beside it."""
    return is_quantized(weight) or weight.dtype.itemsize < 2


def _can_dequantize(weight: Any) -> bool:
    # Tensors themselves have a `dequantize`, which knows no scales.
    return bool(get_bnb_param_type(weight)) or type(weight).dequantize is not torch.Tensor.dequantize


def _dequantized(layer: nn.Linear) -> torch.Tensor:
    """A quantized layer's weight as numbers, (outputs, inputs)."""
    weight: Any = layer.weight
    if not get_bnb_param_type(weight):
        return weight.dequantize()
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # Once used on a CPU, bitsandbytes' 4-bit weights may be packed anew, in a way that only the layer itself reads.
        unit_vectors = torch.eye(layer.in_features, device=weight.device)
        with torch.no_grad():
            outputs = layer.eval()(unit_vectors)
            return (outputs if layer.bias is None else outputs - layer.bias).T
    return dequantize_module_weight(layer)


def _copy_with_values(module: nn.Module) -> nn.Module:
    """A copy that has its values where accelerate keeps the module's own elsewhere (offloading)."""
    hooks = {id(m._hf_hook): m._hf_hook for m in module.modules() if hasattr(m, "_hf_hook")}
    with gather_params_ctx(module.parameters()):  # DeepSpeed's ZeRO-3 keeps them elsewhere, too
        copied = copy.deepcopy(module, dict(hooks))  # a hook may hold the whole model's weights: do not copy it
    if not hooks:
        return copied
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(copied, recurse=True)  # which puts in place the very tensors that the module's hook keeps
    values = dict(backbone_parameters(module))
    for name, parameter in list(copied.named_parameters()):
        if parameter.device.type == "meta" or not is_quantized(parameter):
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, nn.Parameter(values[name].detach().clone()))
    return copied


def copy_with_labels(module: nn.Module, linear: str | None, num_labels: int, initializer_range: float) -> nn.Module:
    """A trainable copy of a head module whose linear layer ``linear`` has ``num_labels`` outputs.

    Weights are kept where sizes agree, so that a fresh adapter answers like the bare model; quantized layers become
    ordinary ones, since a head is trained (:func:`check_copyable` says whether they can).
    """
    copied = _copy_with_values(module)
    for name, layer in list(copied.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        resize = name == linear and layer.out_features != num_labels
        quantized = _is_quantized(layer.weight)
        if not resize and not quantized:
            continue
        outputs = num_labels if name == linear else layer.out_features
        new = nn.Linear(layer.in_features, outputs, bias=layer.bias is not None)
        if resize:
            nn.init.normal_(new.weight, std=initializer_range)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
        else:
            new.weight.data.copy_(_dequantized(layer))
            if layer.bias is not None:
                new.bias.data.copy_(layer.bias)
        move_unless_meta(new, layer.weight.device)
        if not quantized:
            new.to(layer.weight.dtype)
        if not name:
            copied = new
        else:
            copied.set_submodule(name, new)
    return copied
