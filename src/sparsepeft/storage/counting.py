"""Counting parameters on models that have no storage."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
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
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.head_search import find_head
from sparsepeft.models.heads import count_head_parameters
from sparsepeft.models.quantized import cast_for_saving
from sparsepeft.tuners import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig
from sparsepeft.tuners.base import TaskTuner

METHODS = ("full", "houlsby", "pfeiffer", "lora", "bitfit", "head", "spartan")
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}
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
    train_layer_norms: bool = False
    parent_keys: str = "flat"


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

    def attach(self, adapter: PeftConfig, num_labels: int = 2) -> PeftModel:
        """The model with an adapter, without storage."""
        model = self.build(num_labels)
        if isinstance(adapter, LoraConfig):
            adapter.modules_to_save = list(find_head(model, find_blocks(model)).modules)
        with torch.device("meta"):
            attached: PeftModel = get_peft_model(model, adapter)
        return attached

    def backbone_parameters(self) -> int:
        """Parameters of the model without its head."""
        return sum(parameter.numel() for parameter in self.build().parameters()) - self.head_parameters("model", 2)

    def head_parameters(self, head_type: str, num_labels: int) -> int:
        """Parameters of one task's head, counted on an attached adapter."""
        key = (head_type, num_labels)
        if key not in self._heads:
            adapter = SpartanConfig(head_type=head_type, num_labels=num_labels)
            self._heads[key] = count_head_parameters(self.attach(adapter, num_labels))
        return self._heads[key]

    def own(self, method: str) -> Own:
        """A method's own parameters for one task.

        Raises:
            UserError: the method cannot be attached to this architecture.
        """
        if method == "full":
            count = self.backbone_parameters()
            return Own(count, f"N = {count:,}", count, "model")
        model = self.attached(method)
        tuner = model.base_model
        formula, value = tuner.parameter_formula() if isinstance(tuner, TaskTuner) else self._lora_formula(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Own(trained - count_head_parameters(model), formula, value, "attached adapter")

    def attached(self, method: str, num_labels: int = 2) -> PeftModel:
        """The model with a method's adapter and head, without storage."""
        sizes = self.sizes
        # top_k changes no count, but may not exceed the parents.
        memory: dict[str, Any] = {"num_parents": sizes.num_parents, "num_children": sizes.num_children}
        memory |= {"parent_keys": sizes.parent_keys, "train_layer_norms": sizes.train_layer_norms}
        head: dict[str, Any] = {"head_type": sizes.head_type}
        bottleneck = partial(BottleneckConfig, reduction_factor=sizes.reduction_factor, **head)
        adapters: dict[str, Callable[[], PeftConfig]] = {
            "spartan": partial(SpartanConfig, **memory, top_k=min(8, sizes.num_parents), **head),
            "pfeiffer": partial(bottleneck, style="pfeiffer"),
            "houlsby": partial(bottleneck, style="houlsby"),
            "bitfit": partial(BitFitConfig, **head),
            "head": partial(HeadConfig, **head),
            "lora": partial(LoraConfig, r=sizes.lora_rank),
        }
        adapter = adapters[method]()  # where sizes that no model could have are refused
        try:
            return self.attach(adapter, num_labels)
        except ValueError as error:  # LoRA has no default modules for the architecture, BitFit finds no biases
            raise UserError(
                f"{method!r} cannot be counted for {self.config.model_type!r} models ({str(error).rstrip('.')}); leave "
                "it out of the methods."
            ) from error

    def saved_tensors(self, method: str, num_labels: int, save_dtype: str) -> dict[str, torch.Tensor]:
        """What stands in the weights' file that one task adds, without storage."""
        if method == "full":
            tensors: dict[str, torch.Tensor] = dict(self.build(num_labels).state_dict())
        else:
            model = self.attached(method, num_labels)
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cast_for_saving(tensors, save_dtype)

    def _lora_formula(self, model: nn.Module) -> tuple[str, int]:
        rank = self.sizes.lora_rank
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        shapes = Counter((int(layer.in_features or 0), int(layer.out_features or 0)) for layer in layers.values())
        value = rank * sum(n * (width_in + width_out) for (width_in, width_out), n in shapes.items())
        terms = " + ".join(f"{n}·({width_in}+{width_out})" for (width_in, width_out), n in shapes.items())
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        return f"rΣ(d_in+d_out) = {rank}·{terms if len(shapes) == 1 else f'[{terms}]'} = {value:,} ({names})", value


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a safetensors file with these tensors, as PEFT and transformers write it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):  # wide dtypes first
        start, end = end, end + tensor.nbytes
        about = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = about
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end  # the header's length, the header padded to eight bytes, the values


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
