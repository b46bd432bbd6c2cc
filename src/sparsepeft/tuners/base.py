"""What this package's PEFT methods share: finding blocks, heads per task, mixed batches, identity."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationMixin

from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block, find_blocks, media_tokens, unwrap
from sparsepeft.models.context import BASE, ForwardContext
from sparsepeft.models.head_search import HeadSpec, find_head, unmarked_modules
from sparsepeft.models.heads import HeadModule
from sparsepeft.models.identity import backbone_parameters, check_fingerprint, fingerprint, resized_embeddings
from sparsepeft.models.quantized import INT8, cast_for_saving
from sparsepeft.tuners.card import keep_section
from sparsepeft.tuners.checkpointing import GradientCheckpointing
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.files import own_names, plain_name, rename_for_loading
from sparsepeft.tuners.layer import MERGE_REFUSED, TaskTunerLayer
from sparsepeft.tuners.task_heads import add_head, check_head


class TaskTuner(GradientCheckpointing, BaseTuner):
    """Base of this package's tuners; :attr:`layer_class` is the layer that a subclass puts around each block."""

    tuner_layer_cls = TaskTunerLayer
    layer_class: type[TaskTunerLayer] = TaskTunerLayer  # type: ignore[type-abstract]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own attribute; unused, blocks are found

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args: Any, **kwargs: Any
    ) -> None:
        # PeftModel hands over a dictionary, `inject_adapter_in_model` (transformers' `load_adapter`) the config itself.
        self._injected = isinstance(peft_config, PeftConfig)
        self._inference_mode: bool | None = None
        super().__init__(model, peft_config, *args, **kwargs)

    # -- attaching ---------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter: its layers, its head, its labels. See PEFT's ``BaseTuner.inject_adapter``."""
        _check_adapter_name(model, adapter_name)
        # A copy, since the head's modules, labels and the backbone's fingerprint are noted in it: the caller's object
        # can then be used for another model.
        config: Any = copy.copy(self.peft_config[adapter_name])
        config.modules_to_save = None
        if self._injected:
            _check_injected(model, config)
        self.peft_config[adapter_name] = config
        blocks = self._find_targets(model, config)
        head = HeadSpec((), None, "")
        if hasattr(getattr(model, "config", None), "num_labels"):
            head = find_head(model, self._find_layers(model, config), config.head_modules)
        self._check_head(model, config, head)
        self._check_identity(model, config, head)
        self._blocks = {block.name: block for block in blocks}
        self._context = _context_of(model) or ForwardContext()
        for context in (self._context, *_backbone_contexts(model, self._context)):
            context.injected, context.configs, context.call = self._injected, self.peft_config, self._context.call
        config._resolved_names = _by_visit(model, self._blocks)
        inference_mode = self._inference_mode  # of the adapter that stays active
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self._after_injection(model, adapter_name, config, head)
        # PEFT's models for token classification and question answering go through these names and cannot take none.
        config.modules_to_save = list(head.modules) or ["none"]
        if head.modules:
            add_head(model, adapter_name, config, head, self._context)
        config._own_names = own_names(model, adapter_name)
        active = [name for name in self.active_adapters if name in self.peft_config]
        self.set_adapter(active, inference_mode=config.inference_mode if inference_mode is None else inference_mode)

    def _find_layers(self, model: nn.Module, config: TaskAdapterConfig) -> list[Block]:
        """The Transformer layers that the head follows."""
        return find_blocks(model, config.target_modules)

    def _find_targets(self, model: nn.Module, config: TaskAdapterConfig) -> list[Block]:
        """The Transformer layers that the adapter extends."""
        return find_blocks(model, config.target_modules, config.layers_to_transform)

    def _after_injection(self, model: nn.Module, adapter_name: str, config: TaskAdapterConfig, head: HeadSpec) -> None:
        """For subclasses: further per-adapter modules."""
        if self._blocks:
            config.formula = self.parameter_formula(adapter_name)[0]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # the blocks were found by inject_adapter

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config._resolved_names

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
        for name in peft_config._resolved_names[current_key]:
            self._extend(peft_config, adapter_name, name)

    def _extend(self, config: TaskAdapterConfig, adapter_name: str, name: str) -> None:
        """Add an adapter to the module ``name``, around which there may be a layer already, or around what it is in."""
        *path, child = name.split(".")
        parent = unwrap(self.model)
        for part in path:
            parent = unwrap(getattr(parent, part))
        target = getattr(parent, child)
        if isinstance(target, self.layer_class):
            target.update_layer(adapter_name, config)
            return
        layer = self.layer_class(self._blocks[name], self._context)
        layer.train(target.training)
        if adapter_name in self.active_adapters:
            layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, config)
        self._replace_module(parent, child, layer, target)

    def _check_identity(self, model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> None:
        if config._is_from_file and config.check_backbone and config.backbone_fingerprint:
            name = getattr(model, "name_or_path", "") or type(model).__name__
            expected = config.base_model_name_or_path or "unnamed"
            if config.revision:
                expected = f"{expected} (revision {config.revision})"
            exclude = [*head.modules, *resized_embeddings(model)]
            check_fingerprint(config.backbone_fingerprint, model, exclude, expected, name)
        elif not config._is_from_file:
            exclude = [*head.modules, *resized_embeddings(model)]
            always = unmarked_modules(model, self._find_layers(model, config))
            config.backbone_fingerprint = fingerprint(model, exclude, always)
            if config.revision is None:
                config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, TaskTunerLayer):
            child.detach()

    def _check_head(self, model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> None:
        check_head(model, config, head)

    def parameter_formula(self, adapter_name: str = "default") -> tuple[str, int]:
        """The closed formula for the parameters an adapter adds, written out, and its value (head excluded)."""
        widths = [
            module.hidden_size
            for module in self.model.modules()
            if isinstance(module, TaskTunerLayer) and adapter_name in module._get_available_adapters()
        ]
        config: Any = self.peft_config[adapter_name]
        formula: tuple[str, int] = config.parameter_formula(widths)
        return formula

    # -- using -------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, with its head and labels."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._inference_mode = inference_mode

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names was passed while the model is training; call model.eval() for mixed batches."
            )
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names contains {unknown}, but the adapters of this model are {sorted(self.peft_config)} (and "
                f"{BASE!r} for the bare backbone)."
            )
        with self._context.routed(list(names), **_check_mixed(self.model, names, args, kwargs)):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        routing = self._context.call.routing
        if routing is None:
            return super().forward(*args, **kwargs)
        # PEFT's models of a task told the names alone, and not what they are passed with.
        names = routing.adapter_names
        with self._context.routed(names, **_check_mixed(self.model, names, args, kwargs)):
            return super().forward(*args, **kwargs)

    # -- removing ------------------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was the active one, the first of the others becomes active in every layer."""
        if adapter_name in self.peft_config and adapter_name in self.active_adapters:
            # Otherwise PEFT lets each layer choose among the adapters that extend it.
            others = [name for name in self.peft_config if name != adapter_name][:1]
            # Without any, a PeftModel of a task answers nothing: it asks for the config of the deleted one.
            none_left = "no adapter is left: call unload() for the bare backbone, or add one and pass it to set_adapter"
            chosen = f"{others[0]!r} is active now" if others else none_left
            warnings.warn(f"The active adapter {adapter_name!r} was deleted; {chosen}.", UserWarning, stacklevel=2)
            self.set_adapter(others, inference_mode=bool(others) and self.peft_config[others[0]].inference_mode)
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        self.set_adapter(active, inference_mode=bool(self._inference_mode))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: adapters between layers do not add up as changes of a weight do.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} has no add_weighted_adapter: a weighted sum of two tasks' adapters does neither; "
            "train one adapter on both, or answer both in one batch with adapter_names."
        )

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's says None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        labels = self._context.labels
        # PEFT does not look inside the layers it unloads, where LayerNorms and further targets may be wrapped.
        for name, module in reversed(list(self.model.named_modules())):
            if isinstance(module, (HeadModule, TaskTunerLayer)):
                parent, _, child = name.rpartition(".")
                bare = module.original_module if isinstance(module, HeadModule) else module.base_layer
                self._replace_module(self.model.get_submodule(parent), child, bare, module)
        self._context.losses.unwatch()
        for context in _backbone_contexts(self.model, self._context):
            context.configs = {}
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        if labels is not None:
            labels.activate(None)
        return self.model

    # -- dtypes and files --------------------------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            copies = getattr(module, "modules_to_save", None) if isinstance(module, AuxiliaryTrainingWrapper) else None
            if copies is not None and adapter_name in copies:
                _cast(copies[adapter_name], torch.float32 if autocast_adapter_dtype else None)
            if isinstance(module, TaskTunerLayer):
                for container in module.adapter_layer_names:
                    added = getattr(module, container)
                    if adapter_name in added:
                        dtypes = (p.dtype for p in module.base_layer.parameters() if p.is_floating_point())
                        _cast(added[adapter_name], torch.float32 if autocast_adapter_dtype else next(dtypes, None))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Rename a file's tensors to this model's; refuse a file that does not fit, naming all that is wrong with it.

        Raises:
            ValueError: tensors are missing, unexpected, or of another shape.
        """
        return rename_for_loading(model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name just before the last part, but an adapter can have modules of its own below it.
        for container in cls.layer_class.adapter_layer_names:
            before, separator, after = key.partition(f".{container}.{adapter_name}.")
            if separator:
                return f"{before}.{container}.{after}"
        removed: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return removed

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors as PEFT saves them.

        Those of a ``PeftModel`` are exact: its file gets the dtype that the config asks for when the config is written
        beside it. transformers' own ``save_pretrained`` writes the config first, so it is handed that dtype here, for
        checkpoints of ``Trainer`` as well: nothing says for which folder the tensors are.
        """
        # PEFT asks for the tensors when it saves, just before it writes the config.
        context = _context_of(model)
        if context is not None and context.labels is not None:
            context.labels.describe(adapter_name, config)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not isinstance(model, PeftModel):
            return cast_for_saving(selected, config.save_dtype)
        keep_section(model)
        return selected


def _by_visit(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The modules to extend, by the one at which PEFT comes by: it looks into no layer that is extended already."""
    extended = [plain_name(name) for name, module in model.named_modules() if isinstance(module, TaskTunerLayer)]
    visits: dict[str, list[str]] = {}
    for name in names:
        outermost = min((outer for outer in extended if name.startswith(f"{outer}.")), key=len, default=name)
        visits.setdefault(outermost, []).append(name)
    return visits


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse names that would make an adapter's tensors look like the backbone's to PEFT."""
    taken = {part for name, _ in backbone_parameters(model) for part in name.split(".")}
    taken |= {BASE, "", "model", "base_model", *dir(AdapterDict())}  # a ModuleDict cannot hold its attributes' names
    if "." in adapter_name or adapter_name in taken:
        raise ValueError(
            f"The adapter name {adapter_name!r} cannot be used: it is empty, reserved, contains a dot, or is that of a "
            f"module of {type(model).__name__}, whose tensors could be taken for the adapter's; choose another name."
        )


def _check_injected(model: nn.Module, config: TaskAdapterConfig) -> None:
    """Refuse what transformers' own ``load_adapter`` cannot do, and leave out what its ``save_pretrained`` cannot."""
    if config._is_from_file and config.save_dtype == INT8:
        raise ValueError(
            "This adapter's file holds int8 weights, whose scales transformers' own load_adapter would leave out; "
            "load it with PeftModel.from_pretrained."
        )
    if config._is_from_file and any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            f"Weights of {type(model).__name__} are offloaded, and transformers' own load_adapter would put the "
            "adapter's beside them, where they are never read; load the adapter before offloading, or use "
            "get_peft_model with the adapter's config and set_peft_model_state_dict."
        )
    if config.save_dtype == INT8:
        warnings.warn(
            "save_dtype='int8' was given for an adapter inside a model of transformers, whose own load_adapter would "
            "leave out the scales, so the weights will be saved as they are; use get_peft_model for int8, or "
            "save_dtype='bfloat16'.",
            UserWarning,
            stacklevel=2,
        )
        config.save_dtype = None


def _check_mixed(model: nn.Module, names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, bool]:
    """Refuse arguments that do not go with adapter names; return what is known of the batch, see `Routing`."""
    if kwargs.get("labels") is not None:
        raise ValueError(
            "adapter_names and labels were passed together, but the tasks of a mixed batch may have different "
            "losses; leave labels out, or compute each task's loss in a batch of its own."
        )
    inputs = _main_input(model, args, kwargs)
    if inputs is not None and len(inputs) != len(names):
        raise ValueError(
            f"adapter_names has {len(names)} entries for a batch of {len(inputs)}; pass one adapter name per input."
        )
    return {"even": _is_even(model, inputs), "guided": _is_guided(model, kwargs)}


def _main_input(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor whose first dimension counts a batch's inputs: the texts, where there are others beside them."""
    names = ("input_ids", "inputs_embeds", "inputs", getattr(model, "main_input_name", ""))
    given = (*(kwargs.get(name) for name in names), *args[:1])
    return next((value for value in given if isinstance(value, torch.Tensor)), None)


def _is_even(model: nn.Module, inputs: torch.Tensor | None) -> bool:
    """Whether all inputs of a batch bring the same numbers of images, videos and sounds, as their tokens say."""
    tokens = media_tokens(getattr(model, "config", None))
    if inputs is None or inputs.is_floating_point():
        return not tokens
    counts = [(inputs == token).sum(-1) for token in tokens]
    return all(bool((count == count[:1]).all()) for count in counts)


def _is_guided(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether ``generate`` has guidance of the model's own making (transformers' own runs the model once more)."""
    if getattr(type(model), "generate", GenerationMixin.generate) is GenerationMixin.generate:
        return False
    settings = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    scales = (kwargs.get("guidance_scale"), *(getattr(each, "guidance_scale", None) for each in settings))
    return next((scale for scale in scales if scale is not None), 1.0) > 1.0


def _context_of(model: nn.Module) -> ForwardContext | None:
    """What the adapters of ``model`` share; None without any."""
    return next((m.context for m in model.modules() if isinstance(m, (TaskTunerLayer, HeadModule))), None)


def _backbone_contexts(model: nn.Module, context: ForwardContext) -> list[ForwardContext]:
    """Contexts of the backbone's own (a sparse model's), which need to know the adapters, too."""
    contexts = {
        id(other): other for m in model.modules() if isinstance(other := getattr(m, "context", None), ForwardContext)
    }
    return [other for other in contexts.values() if other is not context]


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast half-precision (or, with a dtype below float32, all) floating parameters and buffers in place."""
    if dtype is None:
        return
    for tensor in (*module.parameters(), *module.buffers()):  # a batch norm computes with both
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float64):
            tensor.data = tensor.data.to(dtype)
