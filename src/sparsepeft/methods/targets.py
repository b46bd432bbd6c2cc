"""Which linear maps LoRA and IA3 act on in models that PEFT has no defaults for."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from peft import IA3Config, LoraConfig
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsepeft.errors import UserError
from sparsepeft.models.blocks import Block, find_blocks

# A linear map that gives keys or values, maybe along with queries, by the last part of its name: k, k_proj, to_k, key,
# key_layer, value_proj, kv, Wqkv, c_attn, query_key_value, in_proj, ...
_KEYS_VALUES = re.compile(
    r"(to_?|w|lin_|linear_)?(k|v|q?kv|keys?|values?|key_value|query_key_value|c_attn|in_proj|attn_qkv)"
    r"(_?(proj|projection|lin|linear|layer))?",
    re.IGNORECASE,
)


def choose_targets(config: LoraConfig | IA3Config, backbone: PreTrainedModel) -> None:
    """Name the layers that a config leaves open, where PEFT has no default for the type of model.

    LoRA takes all linear maps in the Transformer layers. IA3 takes, as PEFT's defaults do, those of keys and values and
    the FFN's second; where keys and values cannot be told by their names, all of them.

    Raises:
        UserError: the Transformer layers were not found, or have no linear maps.
    """
    known: Any = (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if isinstance(config, LoraConfig)
        else TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    )
    if config.target_modules is not None or backbone.config.model_type in known:
        return
    try:
        blocks = find_blocks(backbone)
    except ValueError as error:
        raise UserError(str(error)) from error
    maps = {name: sizes for block in blocks for name, sizes in _linear_maps(block).items()}
    if not maps:
        raise UserError(
            f"The Transformer layers of {type(backbone).__name__} have no linear maps that LoRA and IA3 could act on; "
            "choose another `method`, or name the layers by the setting target_modules."
        )
    if isinstance(config, LoraConfig):
        config.target_modules = _shortest(backbone, blocks, set(maps))[0]
        return
    if config.feedforward_modules is not None:
        raise UserError(
            f"The setting feedforward_modules={sorted(config.feedforward_modules)} was given without target_modules, "
            "of which it is a part; name both, or none."
        )
    second = {name for block in blocks for name in _second_of_ffn(block)}
    attention = {name for name in maps if _KEYS_VALUES.fullmatch(name.rpartition(".")[2])}
    targets = attention | second if attention else set(maps)
    config.target_modules, config.feedforward_modules = _shortest(backbone, blocks, targets, second)


def _linear_maps(block: Block) -> dict[str, tuple[int, int]]:
    """Full names of a layer's linear maps, with their numbers of inputs and outputs."""
    maps = {}
    for name, module in block.module.named_modules():
        if isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # a part of nn.MultiheadAttention, which reads its weight and never calls it
        if isinstance(module, nn.Linear):
            maps[f"{block.name}.{name}"] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            maps[f"{block.name}.{name}"] = (module.nx, module.nf)
    return maps


def _second_of_ffn(block: Block) -> list[str]:
    """The maps of an FFN's inner states: the most inputs of all that give the layer's states."""
    inputs = {name: num_inputs for name, (num_inputs, out) in _linear_maps(block).items() if out == block.hidden_size}
    widest = max(inputs.values(), default=0)
    names = [name for name, num_inputs in inputs.items() if num_inputs == widest]
    return names if widest > block.hidden_size else names[-1:]


def _shortest(
    backbone: PreTrainedModel, blocks: list[Block], targets: set[str], feedforward: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Names for PEFT: those within the layers, if they are no other module's; else the full names.

    PEFT takes a name for all modules whose full names end in it. Names within the layers also fit the model where it
    has another head, or none.
    """
    prefixes = tuple(f"{block.name}." for block in blocks)
    within = {name: name.removeprefix(next(filter(name.startswith, prefixes))) for name in targets}
    shown, inner = set(within.values()), {within[name] for name in feedforward}
    endings = tuple(f".{name}" for name in shown)
    meant = {name for name, _ in backbone.named_modules() if f".{name}".endswith(endings)}
    # Of the targets, PEFT tells those of an FFN by how they end, whole words or not.
    inside = {name for name in targets if inner and name.endswith(tuple(inner))}
    if meant == targets and inside == set(feedforward):
        return sorted(shown), sorted(inner)
    return sorted(targets), sorted(feedforward)
