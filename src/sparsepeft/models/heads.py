"""Task heads: each adapter owns the modules between the last block and its labels.

PEFT's ``modules_to_save`` copies a head as it is, so all adapters share one label count and whatever is fresh inside
the backbone (a pooler missing from the checkpoint) is lost. Here every adapter has a head of its own size, and the
model's ``config`` follows the active adapter, so that losses and pipelines use its labels.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.context import BASE, DATA_PARALLEL_REFUSED, ForwardContext, Routing, computed_once
from sparsepeft.models.nested import map_tensors, tensors_in
from sparsepeft.models.quantized import cast_for_saving


class LinearHead(nn.Module):
    """One linear layer on the pooled states: what the model hands its own head, (B, D) or one position's.

    Args:
        in_features: width of the pooled states.
        num_labels: outputs.
        per_position: keep all positions of (B, T, D) input (token classification, question answering).
        position: that is read of (B, T, D) input otherwise: the first, or the last (-1) as XLNet does.
        pooled_by_model: whether the model pools between the head's modules (audio classifiers), so that the pooled
            states are what its last module receives.
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        per_position: bool,
        initializer_range: float = 0.02,
        position: int = 0,
        pooled_by_model: bool = False,
    ) -> None:
        super().__init__()
        self.per_position, self.position, self.pooled_by_model = per_position, position, pooled_by_model
        self.out_proj = nn.Linear(in_features, num_labels)
        nn.init.normal_(self.out_proj.weight, std=initializer_range)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, D) or (B, T, D) -> (B, num_labels), or (B, T, num_labels) if per position."""
        if states.dim() == 3 and not self.per_position:
            states = states[:, self.position]
        return self.out_proj(states)


class HeadModule(ModulesToSaveWrapper):
    """A backbone module of which each adapter may have its own copy: a part of the head, or a LayerNorm.

    Differs from PEFT's wrapper: copies may differ in size; a mixed batch may mix them (logits are padded with -inf);
    copies compute in their own dtype; adapters without a copy use the original; the model's labels follow.
    """

    # The copies are adapter parameters for PEFT's tools even where `adapter_state_dict_load_map` lists none.
    other_param_names = ("modules_to_save",)

    def __init__(
        self,
        module: nn.Module,
        adapter_name: str,
        copy: nn.Module | None,
        context: ForwardContext,
        is_first: bool = False,
        is_output: bool = False,
        batch_dim: int = 0,
        is_tower: bool = False,
    ) -> None:
        self.context = context  # first of all, since looking up any attribute asks it whether adapters are on
        # Past ModulesToSaveWrapper's constructor, which takes no copy; `update` receives it.
        AuxiliaryTrainingWrapper.__init__(self, module, adapter_name, copy=copy)
        self.is_first, self.is_output, self.batch_dim, self.is_tower = is_first, is_output, batch_dim, is_tower
        self._inference_mode = False
        self.set_adapter([])

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make room for the adapters' copies."""
        self.modules_to_save = AdapterDict()

    def update(self, adapter_name: str, *, copy: nn.Module | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Give ``adapter_name`` its own version of this module; None leaves it the original."""
        self.original_module.requires_grad_(False)
        if copy is not None:
            self._adapters.add(adapter_name)
            self.modules_to_save[adapter_name] = copy.requires_grad_(False)  # set_adapter decides

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter here if it has a copy; the model's labels follow either way."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        present = [name for name in names if name in self.modules_to_save]
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                parameter.requires_grad_(name in present and not inference_mode)
        self._active_adapter, self._inference_mode = present, inference_mode
        if self.is_output and self.context.labels is not None:
            self.context.labels.activate(present[0] if present else None)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of the adapters this module serves, for PEFT."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next((name for name in names if name in self.modules_to_save), None)

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters of the whole model are switched off."""
        return self.context.disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the active adapter's copy (and labels) and the original."""
        self.context.set_enabled(enabled)
        if enabled:
            self.set_adapter(self.active_adapters, inference_mode=self._inference_mode)
        else:
            self.modules_to_save.requires_grad_(False)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forget an adapter's copy."""
        if self.context.labels is not None:
            self.context.labels.remove(adapter_name)
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._adapters.discard(adapter_name)
        self.set_adapter(new_active_adapters or [], inference_mode=self._inference_mode)

    def adapter_state_dict(  # type: ignore[override]  # PEFT's own subclasses take the second argument, too
        self, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors as they are saved; see ``TaskTuner._get_adapter_state_dict``."""
        tensors = super().adapter_state_dict(adapter_name, state_dict)
        if not self.context.injected:
            return tensors
        return cast_for_saving(tensors, self.context.configs[adapter_name].save_dtype)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names of an adapter's tensors in its file -> names in this module, for transformers' loader.

        Empty in a PeftModel: PEFT would look each one up before any check and end in a KeyError;
        ``TaskTuner._remap_adapter_state_dict_for_load`` renames them instead.
        """
        return super().adapter_state_dict_load_map(adapter_name) if self.context.injected else {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter's copy, each row's own in a mixed batch, or the original."""
        kwargs.pop("adapter_names", None)  # PEFT may inject it; the context already knows
        if self.disable_adapters:
            return self.original_module(*args, **kwargs)
        call = self.context.call
        if self.is_first:
            call.head_input = next(iter([*args, *kwargs.values()]), None)
        head_input = call.head_input
        if self.is_output:
            call.head_input = None  # or it would keep the graph of the last pass alive
        if call.routing is not None and self.batch_dim:
            by_row = (arg.transpose(0, self.batch_dim) for arg in args)
            return self._mixed_batch_forward(call.routing, head_input, *by_row).transpose(0, self.batch_dim)
        if call.routing is not None:
            return self._mixed_batch_forward(call.routing, head_input, *args, **kwargs)
        active = self.active_adapters[0] if self.active_adapters else BASE
        return self._run(active, args, kwargs, head_input)

    def _replicate_for_data_parallel(self) -> HeadModule:
        raise RuntimeError(DATA_PARALLEL_REFUSED)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare model's own module."""
        return self.original_module

    def _run(self, adapter_name: str, args: tuple, kwargs: dict, head_input: Any) -> Any:
        if adapter_name not in self.modules_to_save:
            return self.original_module(*args, **kwargs)
        module = self.modules_to_save[adapter_name]
        if isinstance(module, LinearHead) and not (module.pooled_by_model and head_input.dim() == 3):
            args, kwargs = (head_input,), {}
        states = [tensor for tensor in tensors_in([args, kwargs]) if tensor.is_floating_point()]
        module_dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        if (
            module_dtype is None  # a dropout that was named as a part of the head
            or not states
            or torch.is_autocast_enabled(states[0].device.type)
            or states[0].dtype == module_dtype
        ):
            return module(*args, **kwargs)
        input_dtype = states[0].dtype

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(module_dtype) if tensor.dtype == input_dtype else tensor

        output = module(*map_tensors(cast, args), **map_tensors(cast, kwargs))
        return map_tensors(lambda tensor: tensor.to(input_dtype) if tensor.is_floating_point() else tensor, output)

    def _mixed_batch_forward(  # type: ignore[override]
        self, routing: Routing, head_input: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given = next(tensors_in([args, kwargs]))
        if isinstance(given, nn.Parameter):  # DeBERTa's relative positions: no rows
            if routing.is_mixed:
                raise computed_once(f"{type(self.original_module).__name__} of the parameter {tuple(given.shape)}")
            return self._run(routing.adapter_names[0], args, kwargs, head_input)
        batch = given.shape[0]
        groups = routing.rows(batch, given.device, is_tower=self.is_tower)
        outputs: dict[str, Any] = {}
        for name, rows in groups.items():

            def take(tensor: torch.Tensor, rows: slice | torch.Tensor = rows) -> torch.Tensor:
                return tensor[rows] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

            part_args, part_kwargs, part_input = map_tensors(take, (args, kwargs, head_input))
            reader = self.modules_to_save[name] if name in self._adapters else self.original_module
            linear = reader.out_proj if isinstance(reader, LinearHead) else reader
            if isinstance(linear, nn.Linear) and part_args:
                # Other rows' states may be wider: not all adapters project them.
                part_args = (part_args[0][..., : linear.in_features], *part_args[1:])
            outputs[name] = self._run(name, part_args, part_kwargs, part_input)

        def join(*parts: torch.Tensor) -> torch.Tensor:
            width = max(part.shape[-1] for part in parts)
            joined = parts[0].new_full((batch, *parts[0].shape[1:-1], width), float("-inf"))
            for rows, part in zip(groups.values(), parts, strict=True):
                joined[rows, ..., : part.shape[-1]] = part.to(joined.dtype)
            return joined

        return map_tensors(join, *outputs.values())


def head_parameters(model: PeftModel, adapter_name: str = "default") -> list[nn.Parameter]:
    """One adapter's own head; copies of other modules (norms) are not among it."""
    config: Any = model.peft_config[adapter_name]
    # peft's own methods name the heads of all architectures, by the end of their names.
    names = tuple(
        f".{n}" for n in getattr(config, "head_modules", None) or getattr(config, "modules_to_save", None) or []
    )
    wrappers = [module for name, module in model.get_base_model().named_modules() if f".{name}".endswith(names)]
    heads: list[Any] = [wrapper.modules_to_save for wrapper in wrappers if hasattr(wrapper, "modules_to_save")]
    return [parameter for head in heads if adapter_name in head for parameter in head[adapter_name].parameters()]


def count_head_parameters(model: PeftModel, adapter_name: str = "default") -> int:
    """How many numbers :func:`head_parameters` holds."""
    return sum(parameter.numel() for parameter in head_parameters(model, adapter_name))
