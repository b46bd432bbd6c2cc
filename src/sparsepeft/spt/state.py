"""What sparsification adds to a layer and a task may train: a router, codebooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.context import DATA_PARALLEL_REFUSED, ForwardContext, Routing
from sparsepeft.spt.config import SptConfig

_Module = TypeVar("_Module", bound=nn.Module)


class SptState(ModulesToSaveWrapper):
    """Holds a module of which every PEFT adapter gets a copy of its own.

    PEFT trains and saves only what is its own. That includes, with adapters of every method, its auxiliary wrappers,
    which it finds anywhere in the model. So this is one: it adds a copy for an adapter as soon as PEFT mentions that
    adapter, without being named in ``modules_to_save``.

    Args:
        module: what all adapters start from; in use itself where there is no adapter. The tensors that its attribute
            ``shared`` names must be the same for all adapters.
        context: of the sparse model; knows which adapter each row of a mixed batch uses.
    """

    is_backbone = False  # left out of the backbone's fingerprint

    def __init__(self, module: nn.Module, context: ForwardContext | None = None) -> None:
        nn.Module.__init__(self)  # the wrapper's own would add an adapter
        self.original_module = module
        self.context = context or ForwardContext()
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.modules_to_save = AdapterDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> SptState:
        return copied_with_model(self, self.context, memo)

    def _replicate_for_data_parallel(self) -> SptState:
        raise RuntimeError(DATA_PARALLEL_REFUSED)

    @property
    def current(self) -> Any:
        """The module in use: the active adapter's, or the one that all copies start from."""
        return in_use(self)

    def forward(self, adapter_names: list[str] | None = None) -> Routing | None:
        """Which adapter each row uses, in a mixed batch. PEFT tells its auxiliary wrappers when they are called."""
        return self.context.call.routing if adapter_names is None else Routing(list(adapter_names))

    def by_row(self, apply: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``apply(module, adapter_names, *tensors)`` with the module in use; in a mixed batch with each row's own.

        Args:
            apply: takes ``adapter_names`` None for those that are active, else those of the rows it is given.
            tensors: (B, ...) each, or with rows that are repeated in place.
        """
        routing = self()
        if routing is None:
            return apply(self.current, None, *tensors)
        groups = routing.rows(len(tensors[0]), tensors[0].device)
        parts = {n: apply(in_use(self, [n]), [n], *(tensor[rows] for tensor in tensors)) for n, rows in groups.items()}
        first = next(iter(parts.values()))
        mixed = first.new_empty(len(tensors[0]), *first.shape[1:])
        for name, rows in groups.items():
            mixed[rows] = parts[name]
        return mixed

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """PEFT asks this before each switch of adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not names:
            return None
        self._ensure_copy(names[0])
        return names[0]

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """What is saved with an adapter."""
        if adapter_name not in self._adapters:
            return {key: state_dict[f"original_module.{key}"] for key in self.original_module.state_dict()}
        saved: dict[str, Any] = super().adapter_state_dict(adapter_name, state_dict)
        return saved

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Where what was saved is loaded to; empty where ``TaskTuner`` renames it (see ``HeadModule``)."""
        self._ensure_copy(adapter_name)
        if adapter_name in self.context.configs and not self.context.injected:
            return {}
        names: dict[str, str] = super().adapter_state_dict_load_map(adapter_name)
        return names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Without PEFT: keep the active adapter's module if merged, else the original one."""
        if merge:
            self.original_module = self.current
        self.modules_to_save.clear()
        self._adapters.clear()
        self._active_adapter = []
        return self

    def _ensure_copy(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            self.update(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter_name in self.modules_to_save:
            for name in getattr(self.original_module, "shared", ()):
                expected = state_dict.get(f"{prefix}original_module.{name}", getattr(self.original_module, name))
                check_same(state_dict.get(f"{prefix}modules_to_save.{adapter_name}.{name}"), expected, name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def copied_with_model(module: _Module, context: ForwardContext, memo: dict[int, Any]) -> _Module:
    """What ``__deepcopy__`` returns of a part of a sparse model.

    Raises:
        ValueError: it is copied by itself, which would leave the copy with a context that nobody tells anything.
    """
    if id(context.losses) not in memo:  # copied without the model, whose hooks lead there first
        raise ValueError(
            "A part of a sparse model was to be copied by itself, as modules_to_save does; name linear layers in "
            "modules_to_save, since routers and codebooks are trained and saved with every adapter anyway."
        )
    copied = memo[id(module)] = type(module).__new__(type(module))
    copied.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copied


def in_use(wrapper: ModulesToSaveWrapper, adapter_names: list[str] | None = None) -> Any:
    """Of a PEFT wrapper's module and its copies, the one used by the active adapter, or by a named one."""
    names = wrapper.active_adapters if adapter_names is None else adapter_names
    present = [name for name in names if name in wrapper.modules_to_save]
    return wrapper.original_module if wrapper.disable_adapters or not present else wrapper.modules_to_save[present[0]]


def check_same(loaded: Tensor | None, expected: Tensor, name: str) -> None:
    """Raise if a file has another value of a tensor that all adapters of the model share."""
    if loaded is not None and not torch.equal(loaded.to(expected.device), expected):
        raise ValueError(_other(name))


def _other(name: str) -> str:
    return (
        f"The file is of a model that was made sparse in another way (its {name} differs); load it into the dense "
        "backbone by sparsepeft.spt.load_sparse, or make the backbone sparse with its settings and data."
    )


class Settings(nn.Module):
    """A config among a model's tensors, so that it is saved with each adapter.

    Args:
        config: how the model was made sparse.
        settings: the same as a file has it, if it came from one. An earlier version's is of another length; a model
            keeps it, as the adapters that are loaded into one model have the same.
    """

    settings: Tensor

    def __init__(self, config: SptConfig, settings: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        if settings is None:
            settings = torch.tensor(list(config.to_json().encode()), dtype=torch.uint8)
        self.register_buffer("settings", settings)
        if config.dense_steps:
            # Optimizer steps done, as the optimizer counts them: the first pass of a resumed training has to know
            # before any step tells.
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}settings"
        if name in state_dict:
            if read_settings(state_dict[name]) != self.config:
                raise ValueError(_other("settings"))
            state_dict[name] = self.settings
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_settings(settings: Tensor) -> SptConfig:
    """The config in a saved tensor."""
    return SptConfig.from_json(bytes(settings.tolist()).decode())
