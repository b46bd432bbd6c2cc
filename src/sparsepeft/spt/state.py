"""What sparsification adds to a layer and a task may train: a router, codebooks."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sparsepeft.spt.config import SptConfig
from sparsepeft.tuners._adapters import AdapterDict


class SptState(ModulesToSaveWrapper):
    """Holds a module of which every PEFT adapter gets a copy of its own.

    PEFT freezes what is not its own, and saves nothing else. What it does train and save with an adapter of any method
    are its auxiliary wrappers, which it looks for in the whole model: so this is one, that adds a copy for an adapter
    as soon as it hears of it, without being named in ``modules_to_save``.

    Args:
        module: what all adapters start from; in use itself where there is no adapter.
    """

    is_backbone = False  # SPARTAN's check of the backbone leaves it out

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)  # the wrapper's own would add an adapter
        self.original_module = module
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.modules_to_save = AdapterDict()

    @property
    def current(self) -> Any:
        """The module in use: the active adapter's, or the one that all start from."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """PEFT asks this before each switch of adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not names:
            return None
        self._know(names[0])
        return names[0]

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """What is saved with an adapter."""
        if adapter_name not in self._adapters:
            return {key: state_dict[f"original_module.{key}"] for key in self.original_module.state_dict()}
        saved: dict[str, Any] = super().adapter_state_dict(adapter_name, state_dict)
        return saved

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Where what was saved is loaded to."""
        self._know(adapter_name)
        names: dict[str, str] = super().adapter_state_dict_load_map(adapter_name)
        return names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The model without PEFT: goes on with the active adapter's module if merged, else with the one from before."""
        if merge:
            self.original_module = self.current
        self.modules_to_save.clear()
        self._adapters.clear()
        self._active_adapter = []
        return self

    def _know(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            self.update(adapter_name)


class Settings(nn.Module):
    """A config among a model's tensors, so that it is saved with each adapter."""

    settings: Tensor

    def __init__(self, config: SptConfig) -> None:
        super().__init__()
        self.register_buffer("settings", torch.tensor(list(config.to_json().encode()), dtype=torch.uint8))


def read_settings(settings: Tensor) -> SptConfig:
    """The config in a saved tensor."""
    return SptConfig.from_json(bytes(settings.tolist()).decode())
