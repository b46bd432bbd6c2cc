"""SPARTAN's tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsepeft.tuners._heads import HeadModule, copy_with_labels
from sparsepeft.tuners._identity import is_quantized
from sparsepeft.tuners.base import TaskTuner, TaskTunerLayer
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.spartan.config import SpartanConfig
from sparsepeft.tuners.spartan.layer import SpartanLayer


class SpartanModel(TaskTuner):
    """Adds SPARTAN memories to a model; made by ``get_peft_model(model, SpartanConfig(...))``."""

    prefix = "spartan_"
    tuner_layer_cls = SpartanLayer

    def _create_and_replace(
        self,
        peft_config: SpartanConfig,
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
        block = self._blocks[current_key]
        layer = SpartanLayer(target, block.hidden_size, "decoder" in current_key.split("."), self._context)
        layer.train(target.training)
        if adapter_name in self.active_adapters:
            layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _after_injection(self, model: nn.Module, adapter_name: str, config: TaskAdapterConfig) -> None:
        if not isinstance(config, SpartanConfig):
            return
        if config.load_balancing_coef:
            self._context.watch(model)
        if config.train_layer_norms:
            self._add_layer_norms(model, adapter_name)

    def _add_layer_norms(self, model: nn.Module, adapter_name: str) -> None:
        """Give the adapter its own copy of every normalisation layer of the backbone."""
        for name, module in list(model.named_modules()):
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            if isinstance(module, HeadModule) and _is_norm(module.original_module):
                module.update(adapter_name, copy_with_labels(module.original_module, None, 0, 0.0))
            elif _is_norm(module) and not isinstance(parent, nn.ModuleDict) and not isinstance(parent, HeadModule):
                copied = copy_with_labels(module, None, 0, 0.0)
                setattr(parent, child, HeadModule(module, adapter_name, copied, self._context))

    def parameter_formula(self, adapter_name: str = "default") -> tuple[str, int]:
        """The closed formula for the parameters of an adapter's memory, written out, and its value (head excluded)."""
        widths = [
            module.hidden_size
            for module in self.model.modules()
            if isinstance(module, TaskTunerLayer) and adapter_name in module._get_available_adapters()
        ]
        formula: tuple[str, int] = self.peft_config[adapter_name].parameter_formula(widths)
        return formula


def _is_norm(module: Any) -> bool:
    name = type(module).__name__.lower()
    weight = getattr(module, "weight", None)
    return "norm" in name and isinstance(weight, nn.Parameter) and not is_quantized(weight) and not list(module.children())
