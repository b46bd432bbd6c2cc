"""SPARTAN: a sparse hierarchical memory after each Transformer layer (arXiv:2211.16634), as a PEFT method."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar

import psutil
import torch
from torch import nn

from sparsepeft.arguments import check_choice, check_flag, check_number, check_whole
from sparsepeft.layers import ProductKeyMemory, SparseMemory
from sparsepeft.layers.product_memory import check_square
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import Block, in_tower, is_norm
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.head_search import HeadSpec
from sparsepeft.models.heads import HeadModule
from sparsepeft.models.identity import is_quantized
from sparsepeft.ops.registry import RENAMED
from sparsepeft.reprs import megabytes
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import SPARTAN, TaskAdapterConfig
from sparsepeft.tuners.head_copies import copy_with_labels
from sparsepeft.tuners.layer import TaskTunerLayer

IMPLS = ("auto", "reference", "torch", "triton")
PARENT_KEYS = {"flat": SparseMemory, "product": ProductKeyMemory}


@dataclass(repr=False)
class SpartanConfig(TaskAdapterConfig):
    """A sparse hierarchical memory after each Transformer layer (arXiv:2211.16634).

    The defaults are the paper's sizes (its appendix A): with them a memory has P (1 + 2 C) d parameters per layer.

    Args:
        num_parents: P, cells of the first level.
        num_children: C, cells under each parent.
        parent_keys: ``"flat"``, a key for each parent; or ``"product"``, for up to tens of thousands of parents: their
            keys are all pairs of sqrt(P) half-keys and as many others, among which the best are found for the cost of
            sqrt(P) (see :func:`sparsepeft.ops.product_memory_read`). ``num_parents`` must then be a square.
        top_k: parents kept per position.
        temperature: divides the child logits (the paper: 1; its released code: 1.6).
        initializer_range: standard deviation of parent and child keys.
        value_initializer_range: standard deviation of child values; with 0 a fresh memory changes no output.
        load_balancing_coef: weight of a loss that keeps all parents in use; 0 leaves it out. Padding never counts.
        train_layer_norms: also train each adapter's own copy of the backbone's normalisation layers, as the
            released code does (the paper's text does not); with ``layers_to_transform``, those of these layers.
        sparse_gradients: whether the gradients of the cells are sparse tensors with the rows of the parents that a
            batch read, so that a step costs what these do. They need an optimizer that takes them, such as
            :class:`sparsepeft.training.LazyAdamW`. None leaves it to the trainer: ``sparsepeft train`` and
            :class:`sparsepeft.training.SparseGradientTrainer` use both where a memory has 16,384 cells or more, others
            get dense gradients.
        impl: implementation of the read (see :func:`sparsepeft.ops.memory_read`): ``"auto"``, which takes the fastest,
            ``"reference"``, ``"torch"`` or, with flat keys on a GPU, ``"triton"``.
        (and those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a size is not positive, top_k exceeds num_parents, or a name is unknown.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> backbone = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
        >>> config = SpartanConfig(num_parents=16, num_children=3, top_k=8, task_type="SEQ_CLS")
        >>> model = get_peft_model(backbone, config)
        >>> model.save_pretrained("out/memory")  # the memory and the head
    """

    part_name: ClassVar[str] = "memory"

    num_parents: int = field(default=16, metadata={"help": "P: parent cells."})
    num_children: int = field(default=3, metadata={"help": "C: child cells per parent."})
    parent_keys: str = field(default="flat", metadata={"help": "Keys of the parents: 'flat' or 'product'."})
    top_k: int = field(default=8, metadata={"help": "K: parents kept per position."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the child logits."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of fresh keys."})
    value_initializer_range: float = field(default=0.0, metadata={"help": "Standard deviation of fresh values."})
    load_balancing_coef: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    train_layer_norms: bool = field(default=False, metadata={"help": "Train copies of the normalisation layers."})
    sparse_gradients: bool | None = field(default=None, metadata={"help": "Sparse gradients of the cells."})
    impl: str = field(default="auto", metadata={"help": "Implementation of the memory read."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARTAN
        for name in ("num_parents", "num_children", "top_k"):
            check_whole(name, getattr(self, name))
        check_number("temperature", self.temperature, above=0)
        if self._is_from_file:
            self.impl = RENAMED.get(self.impl, self.impl)
        check_choice("impl", self.impl, IMPLS)
        if self.sparse_gradients is not None:
            check_flag("sparse_gradients", self.sparse_gradients)
        for name in ("initializer_range", "value_initializer_range", "load_balancing_coef"):
            check_number(name, getattr(self, name), least=0)
        check_choice("parent_keys", self.parent_keys, tuple(PARENT_KEYS))
        if self.parent_keys == "product":
            check_square(self.num_parents)
        if self.impl == "triton" and (self.parent_keys == "product" or self.sparse_gradients):
            raise ValueError(
                "impl='triton' was given with product keys or sparse gradients, but its kernel has neither; use "
                "impl='auto'."
            )
        if self.sparse_gradients and self.impl == "reference":
            raise ValueError("sparse_gradients=True was given with impl='reference', which has none; use impl='auto'.")
        if self.top_k > self.num_parents:
            raise ValueError(
                f"top_k={self.top_k} was given with num_parents={self.num_parents}, but a position can keep at most "
                f"all parents; set top_k to {self.num_parents} or less."
            )
        if self.top_k == 1 and not self._is_from_file:
            warnings.warn(
                "top_k=1: the renormalised weight of a single parent is always 1, so the parents get no gradient and "
                "stay as initialised; use top_k=2 or more to train them.",
                UserWarning,
                stacklevel=3,
            )

    def parameter_formula(self, hidden_sizes: list[int]) -> tuple[str, int]:
        """The closed formula for the memory's parameters, written out, and its value.

        Args:
            hidden_sizes: the width of each layer that gets a memory.
        """
        parents, children = self.num_parents, self.num_children
        if self.parent_keys == "product":
            cells = isqrt(parents) + 2 * parents * children
            symbols, numbers = "(√P+2PC)", f"({isqrt(parents)}+2·{parents}·{children})"
        else:
            cells = parents * (1 + 2 * children)
            symbols, numbers = "P(1+2C)", f"{parents}·(1+2·{children})"
        count = cells * sum(hidden_sizes)
        if len(set(hidden_sizes)) == 1:
            return f"{symbols}dL = {numbers}·{hidden_sizes[0]}·{len(hidden_sizes)} = {count:,}", count
        return f"{symbols}Σd = {numbers}·{sum(hidden_sizes):,} = {count:,}", count


class SpartanLayer(TaskTunerLayer):
    """One Transformer layer with the memories of all adapters that extend it.

    The memory is read in a forward hook of the layer, put before all others, so that whoever records the layer's
    output (``output_hidden_states``) sees the states after the memory.
    """

    adapter_layer_names = ("spartan_memory",)
    other_param_names = ("load_balancing_coef",)

    def __init__(self, block: Block, context: ForwardContext) -> None:
        super().__init__(block, context)
        self.spartan_memory = AdapterDict()
        self.load_balancing_coef: dict[str, float] = {}
        self._handles = [self.base_layer.register_forward_hook(self._after_layer, prepend=True)]

    def update_layer(self, adapter_name: str, config: SpartanConfig) -> None:
        """Add a fresh memory for ``adapter_name``."""
        _check_room(config, self.hidden_size)
        memory = PARENT_KEYS[config.parent_keys](
            self.hidden_size,
            config.num_parents,
            config.num_children,
            config.top_k,
            temperature=config.temperature,
            initializer_range=config.initializer_range,
            value_initializer_range=config.value_initializer_range,
            impl=config.impl,
        )
        memory.sparse_gradients = config.sparse_gradients
        self.add_adapter(self.spartan_memory, adapter_name, memory)
        self.load_balancing_coef[adapter_name] = config.load_balancing_coef
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states after the memory: the active adapter's, or each row's own in a mixed batch. (B, ..., D)."""
        return self.by_row(self.spartan_memory, self._read_one, hidden_states)

    def _read_one(self, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        memory: Any = self.spartan_memory[adapter_name]
        coefficient = self.load_balancing_coef[adapter_name]
        if coefficient and self.training and torch.is_grad_enabled():
            states = hidden_states.transpose(0, self.batch_dim)
            mask = self.context.losses.mask_for(states, self.is_decoder)
            loss = memory.load_balancing_loss(states, mask)
            hidden_states = self.context.losses.attach(hidden_states, coefficient * loss)
        return memory(hidden_states)

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if self.disable_adapters or not self.spartan_memory:
            return None
        return self.change_states(layer, output, self.read)


def _check_room(config: SpartanConfig, hidden_size: int) -> None:
    """Refuse a memory that a machine has no room for, which would end the process without a word."""
    if torch.get_default_device().type != "cpu":
        return
    needed = config.parameter_formula([hidden_size])[1] * torch.get_default_dtype().itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"num_parents={config.num_parents} and num_children={config.num_children} were given, with which a layer's "
            f"memory takes {megabytes(needed)}, but this machine has {megabytes(free)} left; pass fewer."
        )


class SpartanModel(TaskTuner):
    """Adds SPARTAN memories to a model; made by ``get_peft_model(model, SpartanConfig(...))``."""

    prefix = "spartan_"
    layer_class = SpartanLayer

    def _after_injection(self, model: nn.Module, adapter_name: str, config: TaskAdapterConfig, head: HeadSpec) -> None:
        assert isinstance(config, SpartanConfig)
        if config.load_balancing_coef:
            self._context.losses.watch(model)
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
        elsewhere = tuple(f"{name}." for name in (*head.modules, *config._foreign_modules))
        within = tuple(f"{name}." for name in self._blocks) if config.layers_to_transform is not None else ("",)
        for name, module in list(model.named_modules()):
            if f"{name}.".startswith(elsewhere) or ".modules_to_save." in name or not name.startswith(within):
                continue
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            if isinstance(module, HeadModule) and _is_trainable_norm(module.original_module):
                module.update(adapter_name, copy=copy_with_labels(module.original_module, None, 0, 0.0))
            elif _is_trainable_norm(module) and not isinstance(parent, HeadModule):
                copied = copy_with_labels(module, None, 0, 0.0)
                batch_dim = next((b.batch_dim for n, b in self._blocks.items() if name.startswith(f"{n}.")), 0)
                wrapper = HeadModule(
                    module,
                    adapter_name,
                    copied,
                    self._context,
                    batch_dim=max(batch_dim, 0),  # inside Gemma 3n's layers rows are first
                    is_tower=in_tower(model, name),
                )
                setattr(parent, child, wrapper)


def _is_trainable_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    has_weight = isinstance(weight, nn.Parameter) and not is_quantized(weight)
    return is_norm(module) and has_weight and not list(module.children())
