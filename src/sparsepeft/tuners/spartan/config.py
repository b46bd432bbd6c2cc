"""Configuration of SPARTAN."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from sparsepeft.ops.registry import RENAMED
from sparsepeft.tuners.config import TaskAdapterConfig, require_choice, require_positive
from sparsepeft.tuners.registry import SPARTAN

IMPLS = ("auto", "reference", "torch", "triton")


@dataclass(repr=False)
class SpartanConfig(TaskAdapterConfig):
    """A sparse hierarchical memory after each Transformer layer (arXiv:2211.16634).

    The defaults are the paper's sizes (its appendix A): with them a memory has P (1 + 2 C) d parameters per layer.

    Args:
        num_parents: P, cells of the first level.
        num_children: C, cells under each parent.
        top_k: parents kept per position.
        temperature: divides the child logits (the paper: 1; its released code: 1.6).
        initializer_range: standard deviation of parent and child keys.
        value_initializer_range: standard deviation of child values; with 0 a fresh memory changes no output.
        load_balancing_coef: weight of a loss that keeps all parents in use; 0 leaves it out. Padding never counts.
        train_layer_norms: also train each adapter's own copy of the backbone's normalisation layers, as the
            released code does (the paper's text does not); with ``layers_to_transform``, those of these layers.
        impl: implementation of the read, see :func:`sparsepeft.ops.memory_read`.
        (and those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a size is not positive, top_k exceeds num_parents, or a name is unknown.

    Example:
        >>> config = SpartanConfig(num_parents=16, num_children=3, top_k=8, task_type="SEQ_CLS")
    """

    num_parents: int = field(default=16, metadata={"help": "P: parent cells."})
    num_children: int = field(default=3, metadata={"help": "C: child cells per parent."})
    top_k: int = field(default=8, metadata={"help": "K: parents kept per position."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the child logits."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of fresh keys."})
    value_initializer_range: float = field(default=0.0, metadata={"help": "Standard deviation of fresh values."})
    load_balancing_coef: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    train_layer_norms: bool = field(default=False, metadata={"help": "Train copies of the normalisation layers."})
    impl: str = field(default="auto", metadata={"help": "Implementation of the memory read."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARTAN
        for name in ("num_parents", "num_children", "top_k"):
            require_positive(name, getattr(self, name))
        require_positive("temperature", self.temperature, integer=False)
        if self._is_from_file:
            self.impl = RENAMED.get(self.impl, self.impl)
        require_choice("impl", self.impl, IMPLS)
        for name in ("initializer_range", "value_initializer_range", "load_balancing_coef"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{name}={value!r} was given, but {name} must be zero or a positive number.")
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
        cells = self.num_parents * (1 + 2 * self.num_children)
        count = cells * sum(hidden_sizes)
        if len(set(hidden_sizes)) == 1:
            numbers = f"{self.num_parents}·(1+2·{self.num_children})·{hidden_sizes[0]}·{len(hidden_sizes)}"
            return f"P(1+2C)dL = {numbers} = {count:,}", count
        numbers = f"{self.num_parents}·(1+2·{self.num_children})·{sum(hidden_sizes):,}"
        return f"P(1+2C)Σd = {numbers} = {count:,}", count
