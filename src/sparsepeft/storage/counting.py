"""Counting parameters on models that have no storage."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    RobertaConfig,
)

from sparsepeft.errors import UserError
from sparsepeft.tuners import SpartanConfig
from sparsepeft.tuners._blocks import find_blocks
from sparsepeft.tuners._heads import find_head

METHODS = ("full", "houlsby", "pfeiffer", "lora", "spartan")
_CLASSES = (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification)

ROBERTA_BASE_NAMES = ("roberta-base", "FacebookAI/roberta-base")
ROBERTA_BASE_SIZES = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


@dataclass(frozen=True)
class Sizes:
    """What decides how many parameters a method trains."""

    reduction_factor: int
    lora_rank: int
    num_parents: int
    num_children: int
    head_type: str


@dataclass(frozen=True)
class Own:
    """A method's own parameters for one task."""

    parameters: int
    formula: str
    formula_parameters: int
    counted: str


class ParameterCounter:
    """Counts parameters on models of one config, built on the meta device."""

    def __init__(self, config: PreTrainedConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.widths = [block.hidden_size for block in find_blocks(self.build())]
        self._heads: dict[tuple[str, int], int] = {}

    def build(self, num_labels: int = 2) -> nn.Module:
        """The bare model with its own head, without storage."""
        config = copy.deepcopy(self.config)
        config.num_labels = num_labels
        for auto_class in _CLASSES:
            if type(config) in auto_class._model_mapping:
                with torch.device("meta"):
                    built: nn.Module = auto_class.from_config(config)
                return built
        raise UserError(
            f"transformers has no classification model for {config.model_type!r} models, so heads cannot be counted; "
            "choose another model."
        )

    def attach(self, adapter: PeftConfig, num_labels: int = 2) -> nn.Module:
        """The model with an adapter, without storage."""
        model = self.build(num_labels)
        if isinstance(adapter, LoraConfig):
            adapter.modules_to_save = list(find_head(model, find_blocks(model)).modules)
        with torch.device("meta"):
            return get_peft_model(model, adapter)

    def backbone_parameters(self) -> int:
        """Parameters of the model without its head."""
        return _num_parameters(self.build()) - self.head_parameters("model", 2)

    def head_parameters(self, head_type: str, num_labels: int) -> int:
        """Parameters of one task's head, counted on an attached adapter."""
        key = (head_type, num_labels)
        if key not in self._heads:
            adapter = SpartanConfig(head_type=head_type, num_labels=num_labels)
            self._heads[key] = _head_parameters(self.attach(adapter, num_labels))
        return self._heads[key]

    def own(self, method: str) -> Own:
        """A method's own parameters for one task."""
        counts: dict[str, Callable[[], Own]] = {
            "full": self._full,
            "houlsby": self._houlsby,
            "pfeiffer": self._pfeiffer,
            "lora": self._lora,
            "spartan": self._spartan,
        }
        return counts[method]()

    def _full(self) -> Own:
        count = self.backbone_parameters()
        return Own(count, f"N = {count:,}", count, "model")

    def _spartan(self) -> Own:
        parents = self.sizes.num_parents
        # top_k changes no count, but may not exceed the parents.
        adapter = SpartanConfig(num_parents=parents, num_children=self.sizes.num_children, top_k=min(8, parents))
        formula, value = adapter.parameter_formula(self.widths)
        return Own(_own_parameters(self.attach(adapter)), formula, value, "attached adapter")

    def _lora(self) -> Own:
        rank = self.sizes.lora_rank
        try:
            model = self.attach(LoraConfig(r=rank))
        except ValueError as error:  # no default modules for the architecture
            raise UserError(
                f"LoRA cannot be counted for {self.config.model_type!r} models ({str(error).rstrip('.')}); leave "
                "'lora' out of the methods."
            ) from error
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        shapes = Counter((int(layer.in_features or 0), int(layer.out_features or 0)) for layer in layers.values())
        value = rank * sum(n * (width_in + width_out) for (width_in, width_out), n in shapes.items())
        terms = " + ".join(f"{n}·({width_in}+{width_out})" for (width_in, width_out), n in shapes.items())
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        formula = f"rΣ(d_in+d_out) = {rank}·{terms if len(shapes) == 1 else f'[{terms}]'} = {value:,} ({names})"
        return Own(_own_parameters(model), formula, value, "attached adapter")

    def _pfeiffer(self) -> Own:
        return self._bottleneck(1, "L", "")

    def _houlsby(self) -> Own:
        return self._bottleneck(2, "2L", "2·")

    def _bottleneck(self, per_layer: int, symbol: str, factor: str) -> Own:
        """Two linear layers with biases, d -> d/r -> d, once or twice per layer."""
        shapes = Counter((d, max(1, d // self.sizes.reduction_factor)) for d in self.widths)
        value = per_layer * sum(n * (2 * d * inner + inner + d) for (d, inner), n in shapes.items())
        terms = " + ".join(f"{n}·(2·{d}·{inner} + {inner} + {d})" for (d, inner), n in shapes.items())
        numbers = f"{factor}{terms}" if len(shapes) == 1 or not factor else f"{factor}[{terms}]"
        return Own(value, f"{symbol}(2d(d/r) + d/r + d) = {numbers} = {value:,}", value, "formula")


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head_parameters(model: nn.Module) -> int:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return sum(_num_parameters(wrapper.modules_to_save) for wrapper in wrappers)


def _own_parameters(model: nn.Module) -> int:
    """Everything trainable but the head."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable - _head_parameters(model)


def load_config(model: str) -> PreTrainedConfig:
    """The model's config; RoBERTa-base's is built in.

    Raises:
        UserError: there is none to be had.
    """
    if model in ROBERTA_BASE_NAMES and not Path(model).is_dir():
        return RobertaConfig.from_dict(ROBERTA_BASE_SIZES | {"layer_norm_eps": 1e-5})
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"No config for the model {model!r} could be had ({reason}); pass a local folder with config.json, or the "
            "id of a model on the hub (which needs a network or its cache)."
        ) from error
