"""Training a model's head alone: the baseline every adapter has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from sparsepeft.models.blocks import Block, find_blocks
from sparsepeft.models.head_search import HeadSpec
from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.config import HEAD, TaskAdapterConfig


@dataclass(repr=False)
class HeadConfig(TaskAdapterConfig):
    """Trains the head and nothing else (a linear probe); a PEFT method, so that it is saved and loaded like the others.

    Args:
        (those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`; no layer is extended)

    Raises:
        ValueError: when attached to a model without a task's head (a bare encoder, a language model).

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> backbone = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
        >>> model = get_peft_model(backbone, HeadConfig(num_labels=3, task_type="SEQ_CLS"))
        >>> model.config.num_labels
        3
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HEAD
        self.target_modules = DUMMY_TARGET_MODULES  # PEFT's name for "extend no module"

    def parameter_formula(self, hidden_sizes: list[int]) -> tuple[str, int]:
        """Nothing beside the head."""
        return "0 (the head alone) = 0", 0


class HeadModel(TaskTuner):
    """Gives each adapter a head of its own on the unchanged backbone."""

    prefix = "head_"

    def _find_targets(self, model: nn.Module, config: TaskAdapterConfig) -> list[Block]:
        return []

    def _find_layers(self, model: nn.Module, config: TaskAdapterConfig) -> list[Block]:
        return find_blocks(model)

    def _check_head(self, model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> None:
        super()._check_head(model, config, head)
        if not head.modules:
            raise ValueError(
                f"HeadConfig trains a task's head alone, and {type(model).__name__} has none (what maps a language "
                "model's states to tokens belongs to its backbone); load a class with a head, such as "
                "AutoModelForSequenceClassification, name the modules to train in head_modules, or use another method."
            )

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Never called: no module is targeted."""
