"""Finding a model's Transformer layers ("blocks"), whatever the architecture calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
# By model type, where the rows of a batch are not the states' first dimension. XLNet, FSMT and BridgeTower's images
# have (T, B, D). Gemma 3n's layers hand on several versions of their states, (4, B, T, D), but have (B, T, D) inside:
# counted from the end, one number says both.
_BATCH_DIMS = {"xlnet": 1, "fsmt": 1, "bridgetower_vision_model": 1, "gemma3n_text": -3}
_DEPTH_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
Stack = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Block:
    """One Transformer layer.

    Attributes:
        name: its dotted name.
        module: the layer.
        index: its position in its stack.
        hidden_size: the width of its states.
        is_decoder: whether it stands in the decoder of an encoder-decoder.
        batch_dim: which dimension of its states counts the rows of a batch.
        is_tower: whether its states are of images or sounds, which a model puts between those of a text.
    """

    name: str
    module: nn.Module
    index: int
    hidden_size: int
    is_decoder: bool
    batch_dim: int
    is_tower: bool


def unwrap(module: nn.Module) -> nn.Module:
    """The module below any PEFT layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by the name of its class: architectures have their own classes."""
    return "norm" in type(module).__name__.lower()


def find_blocks(
    model: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
) -> list[Block]:
    """The Transformer layers of ``model``, in registration order.

    Found as the lists of modules that transformers itself records as hidden states or checkpoints; failing that, as
    a homogeneous list as long as the config's number of layers.

    Args:
        model: any module; a model that already carries PEFT layers is looked through.
        target_modules: overrides the search: a regular expression over full names, or names or suffixes of names.
        layers_to_transform: positions within each stack to keep (an encoder-decoder has two stacks).

    Raises:
        ValueError: nothing found or matched, or a position out of range; the message names what there is.
    """
    stacks = _search(model) if target_modules is None else _match(model, target_modules)
    if not stacks:
        raise ValueError(_nothing_found(model, target_modules))
    config: Any = getattr(model, "config", None)
    has_encoder = bool(getattr(config, "is_encoder_decoder", False))
    blocks = [
        Block(
            name=name,
            module=module,
            index=index,
            hidden_size=_hidden_size(model, name, module),
            is_decoder=has_encoder and "decoder" in name.split("."),
            batch_dim=_BATCH_DIMS.get(_model_type(model, name), 0),
            is_tower=in_tower(model, name),
        )
        for stack in stacks
        for index, (name, module) in enumerate(stack)
    ]
    if layers_to_transform is None:
        return blocks
    positions = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    unknown = sorted(positions - {block.index for block in blocks})
    if unknown or not positions:
        deepest = max(block.index for block in blocks)
        raise ValueError(
            f"layers_to_transform={sorted(positions)} does not fit {type(model).__name__}, whose layers are numbered "
            f"0 to {deepest}; pass positions in that range."
        )
    return [block for block in blocks if block.index in positions]


def media_tokens(config: Any) -> list[int]:
    """Tokens that stand in a text for images, videos and sounds."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    return [token for name in names if isinstance(token := getattr(config, name, None), int)]


def in_tower(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` has states of images or sounds, in a model that puts them between those of a text."""
    config: Any = getattr(model, "config", None)
    return bool(media_tokens(config)) and _model_type(model, name) != config.get_text_config().model_type


def _model_type(model: nn.Module, name: str) -> str:
    """That of the innermost module around ``name`` that has a config."""
    around = _around(model, name.replace(".base_layer", ""))  # a layer's that is extended already
    types = (getattr(getattr(module, "config", None), "model_type", None) for _, module in reversed(around))
    return next((found for found in types if found), "")


def _around(model: nn.Module, name: str) -> Stack:
    """The model, what holds ``name`` in it, and ``name``, by names as in :func:`named_modules`."""
    around = [("", unwrap(model))]
    for part in name.split("."):
        outer, module = around[-1]
        child = dict(module.named_children()).get(part)
        if child is None:  # inside one of PEFT's wrappers
            break
        around.append((f"{outer}.{part}" if outer else part, unwrap(child)))
    return around


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Like ``model.named_modules``, with the backbone's own names and without PEFT's wrappers and additions."""

    def walk(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
        module = unwrap(module)
        yield prefix, module
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}.{name}" if prefix else name)

    return walk(model, "")


def _lists(model: nn.Module) -> dict[str, Stack]:
    """All non-empty ``ModuleList``s by name."""
    return {
        name: [(f"{name}.{key}" if name else key, unwrap(child)) for key, child in module.named_children()]
        for name, module in named_modules(model)
        if isinstance(module, nn.ModuleList) and len(module)
    }


def _search(model: nn.Module) -> list[Stack]:
    lists = _lists(model)
    owners = {name: _owner(model, name) for name in lists}
    recorded = _recorded_classes(model)
    chosen = {name for name, stack in lists.items() if all(isinstance(m, recorded) for _, m in stack)}
    recorded_owners = {owners[name] for name in chosen}
    # A checkpointed list counts where nothing is recorded: speech models also checkpoint their convolutions.
    chosen |= {name for name, stack in lists.items() if owners[name] not in recorded_owners and _is_checkpointed(stack)}
    if not chosen:
        config = getattr(model, "config", None)
        depths = {n for name in _DEPTH_NAMES if isinstance(n := getattr(config, name, None), int)}
        chosen = {
            name for name, stack in lists.items() if len(stack) in depths and len({type(m) for _, m in stack}) == 1
        }
    # Hierarchical vision models list stages that list layers: the layers are meant.
    for name in sorted(chosen):
        nested = {other for other in lists if other.startswith(f"{name}.") and _is_checkpointed(lists[other])}
        if nested:
            chosen = (chosen - {name}) | nested
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    return [lists[name] for name in lists if name in outermost]


def _is_checkpointed(stack: Stack) -> bool:
    return all(isinstance(module, GradientCheckpointingLayer) for _, module in stack)


def _recorded_classes(model: nn.Module) -> tuple[type, ...]:
    """Classes whose outputs transformers records as ``hidden_states``."""
    classes: set[type] = set()
    for _, module in named_modules(model):
        if not isinstance(module, PreTrainedModel):
            continue
        specs = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states", ())
        for spec in specs if isinstance(specs, (list, tuple)) else (specs,):
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type):
                classes.add(target)
    return tuple(classes)


def _owner(model: nn.Module, name: str) -> str:
    """The name of the innermost ``PreTrainedModel`` that holds ``name``."""
    owners = [outer for outer, module in _around(model, name) if isinstance(module, PreTrainedModel)]
    return owners[-1] if owners else ""


def _match(model: nn.Module, target_modules: str | Iterable[str]) -> list[Stack]:
    """User-given names, grouped by their parent so that ``layers_to_transform`` counts within a stack."""
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        matched = [(n, m) for n, m in named_modules(model) if n and pattern.fullmatch(n)]
    else:
        names = tuple(target_modules)
        suffixes = tuple(f".{name}" for name in names)
        matched = [(n, m) for n, m in named_modules(model) if n and (n in names or n.endswith(suffixes))]
    stacks: dict[str, Stack] = {}
    for name, module in matched:
        stacks.setdefault(name.rpartition(".")[0], []).append((name, module))
    return list(stacks.values())


def _hidden_size(model: nn.Module, name: str, block: nn.Module) -> int:
    """The width of a block's states: the nearest config's, if the block has vectors of that size, else its norm's."""
    vectors = [p.shape[0] for p in block.parameters() if p.dim() == 1]
    for _, module in reversed(_around(model, name)):
        config = getattr(module, "config", None)
        for width_name in _WIDTH_NAMES:
            width = getattr(config, width_name, None)
            if isinstance(width, int) and (not vectors or width in vectors):
                return width
    norms = [m for m in block.modules() if is_norm(m) and getattr(m, "weight", None) is not None]
    if norms:
        return int(norms[0].get_parameter("weight").shape[0])
    raise ValueError(
        f"The width of {name!r} ({type(block).__name__}) could not be told from the model's config or a normalisation "
        "layer; choose other target_modules, whose outputs end in the hidden size."
    )


def _nothing_found(model: nn.Module, target_modules: str | Iterable[str] | None) -> str:
    candidates = [
        f"'{stack[0][0]}' ({type(stack[0][1]).__name__}, {len(stack)} in its list)" for stack in _lists(model).values()
    ]
    what = (
        f"No Transformer layers were found in {type(model).__name__}"
        if target_modules is None
        else f"target_modules={target_modules!r} matches no module of {type(model).__name__}"
    )
    shown = "; candidates: " + ", ".join(candidates[:5]) if candidates else ""
    return f"{what}; set target_modules to the names (or one regular expression) of the layers to extend{shown}."
