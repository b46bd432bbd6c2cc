"""SPARTAN's tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsepeft.tuners._heads import HeadModule, HeadSpec, copy_with_labels
from sparsepeft.tuners._identity import is_quantized
from sparsepeft.tuners.base import TaskTuner, TaskTunerLayer
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.spartan.config import SpartanConfig
from sparsepeft.tuners.spartan.layer import SpartanLayer


class SpartanModel(TaskTuner):
    """Adds SPARTAN memories to a model; made by ``get_peft_model(model, SpartanConfig(...))``."""

    prefix = "spartan_"

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SpartanLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = SpartanLayer(self._blocks[current_key], self._context)
        layer.train(target.training)
        if adapter_name in self.active_adapters:
            layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _after_injection(self, model: nn.Module, adapter_name: str, config: TaskAdapterConfig, head: HeadSpec) -> None:
        if not isinstance(config, SpartanConfig):
            return
        config.formula = self.parameter_formula(adapter_name)[0]
        if config.load_balancing_coef:
            self._context.watch(model)
        if config.train_layer_norms:
            self._add_layer_norms(model, adapter_name, head)

    def _add_layer_norms(self, model: nn.Module, adapter_name: str, head: HeadSpec) -> None:
        """Give the adapter its own copy of every normalisation layer of the backbone; the head's are its own anyway."""
        in_head = tuple(f"{name}." for name in head.modules)
        for name, module in list(model.named_modules()):
            if f"{name}.".startswith(in_head) or ".modules_to_save." in name:
                continue
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            if isinstance(module, HeadModule) and _is_norm(module.original_module):
                module.update(adapter_name, copy=copy_with_labels(module.original_module, None, 0, 0.0))
            elif _is_norm(module) and not isinstance(parent, HeadModule):
                copied = copy_with_labels(module, None, 0, 0.0)
                setattr(parent, child, HeadModule(module, adapter_name, copied, self._context))

    def parameter_formula(self, adapter_name: str = "default") -> tuple[str, int]:
        """The closed formula for the parameters of an adapter's memory, written out, and its value (head excluded)."""
        widths = [
            module.hidden_size
            for module in self.model.modules()
            if isinstance(module, TaskTunerLayer) and adapter_name in module._get_available_adapters()
        ]
        config: Any = self.peft_config[adapter_name]
        formula: tuple[str, int] = config.parameter_formula(widths)
        return formula


def _is_norm(module: Any) -> bool:
    name = type(module).__name__.lower()
    weight = getattr(module, "weight", None)
    return (
        "norm" in name and isinstance(weight, nn.Parameter) and not is_quantized(weight) and not list(module.children())
    )
