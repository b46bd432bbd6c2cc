"""The projections of a sparse FFN, with what adapters have put around them, as the operators take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.models.blocks import unwrap
from sparsepeft.models.sublayers import weight_of
from sparsepeft.ops.routed_ffn import LowRank, Projection
from sparsepeft.spt.state import in_use
from sparsepeft.tuners.bitfit import BiasShift


def read_projection(module: nn.Module, name: str, adapter_names: list[str] | None) -> Projection:
    """A projection in the form that the op takes.

    Args:
        module: a linear layer, or what PEFT has put around it.
        name: for messages.
        adapter_names: None for the active adapters, else the one that a mixed batch names for the rows at hand.

    Raises:
        ValueError: something acts on it that would be lost.
    """
    is_hooked = adapter_names is None and len(module._forward_pre_hooks) > 0  # in a mixed batch PEFT hands on the names
    if isinstance(module, ModulesToSaveWrapper):
        module = in_use(module, adapter_names)
    if isinstance(module, BaseTunerLayer) and module.disable_adapters and module.merged:
        module.unmerge()  # as PEFT's own forward does
    base: Any = unwrap(module)
    shifts = [hook for hook in base._forward_hooks.values() if isinstance(hook, BiasShift)]
    is_hooked |= module is not base and len(base._forward_pre_hooks) > 0
    if is_hooked or len(base._forward_hooks) > len(shifts) or hasattr(base, "_hf_hook"):
        raise ValueError(
            f"Something acts on {name} from outside (a hook, or accelerate, which keeps weights elsewhere), but a "
            "sparse FFN does not call it as a module; take the hook away and keep the model on one device, or leave "
            "the FFNs dense with SptConfig(ffn=False)."
        )
    updates, biases = _updates(module, name, adapter_names)
    biases = [base.bias, *(shift.of(adapter_names) for shift in shifts), *biases]
    present = [bias for bias in biases if bias is not None]
    return Projection(weight_of(base), sum(present[1:], present[0]) if present else None, tuple(updates))


def inner_tensors(module: nn.Module, name: str, is_output: bool) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a projection that have the inner dimension, and which of theirs it is.

    Args:
        module: a linear layer, or what PEFT has put around it.
        name: for messages.
        is_output: whether the inner dimension is the projection's output.

    Raises:
        ValueError: an adapter of another kind than LoRA is on it.
    """
    if isinstance(module, ModulesToSaveWrapper):
        for copied in (module.original_module, *module.modules_to_save.values()):
            yield from inner_tensors(copied, name, is_output)
        return
    base: Any = unwrap(module)
    weight_of(base)
    for part, dim in inner_dims(base, is_output).items():
        yield base.get_parameter(part), dim
    if isinstance(module, BaseTunerLayer):
        if not _is_plain_lora(module, list(module.lora_A) if isinstance(module, LoraLinear) else []):
            raise ValueError(_refusal(module, name))
        updates: Any = module.lora_B if is_output else module.lora_A
        for update in updates.values():
            for part, dim in inner_dims(update, is_output).items():
                yield update.get_parameter(part), dim


def inner_dims(linear: Any, is_output: bool) -> dict[str, int]:
    """For each parameter of a linear layer that has the inner dimension, which of its dimensions that is."""
    dims = {"weight": int(is_output == isinstance(linear, Conv1D))}  # nn.Linear holds (out, in), Conv1D (in, out)
    return dims | {"bias": 0} if is_output and linear.bias is not None else dims


def _updates(module: nn.Module, name: str, adapter_names: list[str] | None) -> tuple[list[LowRank], list[Any]]:
    """LoRA's updates of a projection, and of its bias."""
    if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
        return [], []
    if module.merged:
        if adapter_names is not None:
            raise ValueError("adapter_names was passed, but adapters are merged; call unmerge_adapter first.")
        return [], []
    names = [one for one in (adapter_names or module.active_adapters) if one in module._get_available_adapters()]
    if not names:
        return [], []
    if not _is_plain_lora(module, names):
        raise ValueError(_refusal(module, name))
    layer: Any = module
    updates, biases = [], []
    for adapter in names:
        dropout, down, up = layer.lora_dropout[adapter], layer.lora_A[adapter], layer.lora_B[adapter]
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        updates.append(LowRank(down.weight, up.weight, layer.scaling[adapter], probability))
        biases.append(None if up.bias is None else layer.scaling[adapter] * up.bias)
    return updates, biases


def _is_plain_lora(module: nn.Module, adapter_names: list[str]) -> bool:
    return type(module) is LoraLinear and not any(name in module.lora_variant for name in adapter_names)


def _refusal(module: nn.Module, name: str) -> str:
    kind = f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"  # ia3.Linear, lora.ParamWrapper
    kind = ", ".join(
        [kind, *sorted({type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()})]
    )
    return (
        f"{name} of a sparse FFN carries an adapter that is no plain LoRA ({kind}); let it act on other modules "
        "(target_modules), or leave the FFNs dense with SptConfig(ffn=False)."
    )
