"""SPARTAN's tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsepeft.models.heads import HeadModule, HeadSpec, copy_with_labels
from sparsepeft.models.identity import is_quantized
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.spartan.config import SpartanConfig
from sparsepeft.tuners.spartan.layer import SpartanLayer


class SpartanModel(TaskTuner):
    """Adds SPARTAN memories to a model; made by ``get_peft_model(model, SpartanConfig(...))``."""

    prefix = "spartan_"
    layer_class = SpartanLayer

    def _after_injection(self, model: nn.Module, adapter_name: str, config: TaskAdapterConfig, head: HeadSpec) -> None:
        assert isinstance(config, SpartanConfig)
        if config.load_balancing_coef:
            self._context.watch(model)
        if config.train_layer_norms:
            self._add_layer_norms(model, adapter_name, config, head)
        super()._after_injection(model, adapter_name, config, head)

    def parameter_formula(self, adapter_name: str = "default") -> tuple[str, int]:
        """The closed formula for the memory's parameters, and what an adapter's own norms add, with its value."""
        formula, value = super().parameter_formula(adapter_name)
        config: Any = self.peft_config[adapter_name]
        in_head = config.head_modules or ()
        norms = sum(
            parameter.numel()
            for name, module in self.model.named_modules()
            if isinstance(module, HeadModule) and name not in in_head and adapter_name in module.modules_to_save
            for parameter in module.modules_to_save[adapter_name].parameters()
        )
        return (f"{formula}, and norms {norms:,}" if norms else formula), value + norms

    def _add_layer_norms(self, model: nn.Module, adapter_name: str, config: SpartanConfig, head: HeadSpec) -> None:
        """Give the adapter its own copy of every normalisation layer of the backbone; the head's are its own anyway.

        Kept to some layers, it gets the norms of those layers alone.
        """
        in_head = tuple(f"{name}." for name in head.modules)
        within = tuple(f"{name}." for name in self._blocks) if config.layers_to_transform is not None else ("",)
        for name, module in list(model.named_modules()):
            if f"{name}.".startswith(in_head) or ".modules_to_save." in name or not name.startswith(within):
                continue
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            if isinstance(module, HeadModule) and _is_norm(module.original_module):
                module.update(adapter_name, copy=copy_with_labels(module.original_module, None, 0, 0.0))
            elif _is_norm(module) and not isinstance(parent, HeadModule):
                copied = copy_with_labels(module, None, 0, 0.0)
                setattr(parent, child, HeadModule(module, adapter_name, copied, self._context))


def _is_norm(module: Any) -> bool:
    name = type(module).__name__.lower()
    weight = getattr(module, "weight", None)
    return (
        "norm" in name and isinstance(weight, nn.Parameter) and not is_quantized(weight) and not list(module.children())
    )
