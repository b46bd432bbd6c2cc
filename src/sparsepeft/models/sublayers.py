"""Where the attention and the FFN of a Transformer layer are, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.models.blocks import Block, find_blocks, named_modules, unwrap
from sparsepeft.models.identity import is_quantized
from sparsepeft.models.onednn import OneDnnLinear

# What gives a sublayer's output h, the last thing before "residual + h": a dropout where that is a module of its own,
# else the sublayer. The first name that a layer has is taken, so longer paths come first.
_ATTENTION = (
    "attention.output.dropout",  # BERT and its kin
    "attention.output_dropout",  # ALBERT
    "attention.LayerNorm attention.dropout",  # MPNet
    "layer.0.dropout",  # T5
    "post_feedforward_layernorm post_attention_layernorm",  # Gemma 2 and 3 normalise h itself
    "self_attn",
    "self_attention",
    "attn",
    "attention",
)
_FFN = (
    "output.dropout",  # BERT and its kin
    "ffn_output",  # ALBERT
    "layer.2.DenseReluDense layer.2.dropout",  # T5's decoder
    "layer.1.DenseReluDense layer.1.dropout",  # T5's encoder
    "post_feedforward_layernorm",  # Gemma 2 and 3
    "mlp",
    "feed_forward",
    "ffn",
    "activation_fn.fc2 activation_fn",  # the same made sparse: the sparse FFN stands where the activation was
    "fc2",  # BART, OPT, Whisper
    "block_sparse_moe",
)


def find_sublayer(block: nn.Module, which: str, name: str | None = None) -> nn.Module:
    """The module in ``block`` whose output is a sublayer's h.

    Args:
        block: one Transformer layer.
        which: ``"attention"`` or ``"ffn"``.
        name: its dotted name in the layer, where the caller knows it.

    Raises:
        ValueError: there is none; the message names what there is.
    """
    modules = {path: module for path, module in named_modules(block) if path}
    # Several names in an entry must all be there; the last one is meant.
    entries = [name] if name else list(_ATTENTION if which == "attention" else _FFN)
    for entry in entries:
        names = entry.split()
        if all(path in modules for path in names):
            return modules[names[-1]]
    children = ", ".join(path for path in modules if "." not in path)
    missing = f"no module {name!r}" if name else f"no {which} sublayer that is known"
    raise ValueError(
        f"{type(block).__name__} has {missing}; set {which}_module to the name, inside this layer, of the module that "
        f"returns what the residual is added to (its modules: {children}), or use style='pfeiffer', which needs none."
    )


class PartNames(NamedTuple):
    """How the parts of an FFN are called, relative to the module that has them."""

    gate: str | None
    up: str
    down: str
    activation: str
    inner_dropout: str | None = None  # between activation and down projection
    outer_dropout: str | None = None  # behind the down projection


# A module that is nothing but an FFN, and a layer that has the FFN's parts among others.
_MODULES = (
    PartNames("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama, Mistral, Qwen, Gemma
    PartNames("wi_0", "wi_1", "wo", "act", inner_dropout="dropout"),  # T5 v1.1
    PartNames(None, "wi", "wo", "act", inner_dropout="dropout"),  # T5
    PartNames(None, "c_fc", "c_proj", "act", outer_dropout="dropout"),  # GPT-2
)
_LAYERS = (
    PartNames(None, "fc1", "fc2", "activation_fn"),  # OPT
    PartNames(None, "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"),  # BERT, RoBERTa
)


@dataclass(frozen=True)
class FeedForward:
    """An FFN in a model.

    Attributes:
        owner: the module that has its parts.
        name: of the owner.
        names: of the parts.
        activation: between the projections.
        sizes: hidden and inner size.
        is_decoder: whether the layer is one of a decoder beside an encoder.
        is_module: whether the owner is nothing but the FFN, so that it can be replaced as a whole.
    """

    owner: nn.Module
    name: str
    names: PartNames
    activation: Callable[[Tensor], Tensor]
    sizes: tuple[int, int]
    is_decoder: bool
    is_module: bool

    def part(self, name: str) -> nn.Module:
        """A part by its relative name."""
        return self.owner.get_submodule(name)

    @property
    def projection_names(self) -> tuple[str, ...]:
        """Names of the linear maps."""
        return tuple(name for name in (self.names.gate, self.names.up, self.names.down) if name is not None)

    @property
    def routed_name(self) -> str:
        """The name of what takes its place: the owner's, or the activation's where the owner is more than the FFN."""
        return self.name if self.is_module else f"{self.name}.{self.names.activation}"


def find_feed_forwards(model: nn.Module, layers: int | Iterable[int] | None = None) -> list[FeedForward]:
    """The FFN of every Transformer layer, or of the layers with these indices.

    Raises:
        ValueError: a layer has none that is known, or an index is out of range.
    """
    return [_in_layer(block) for block in find_blocks(model, layers_to_transform=layers)]


def weight_of(projection: nn.Module) -> Tensor:
    """A projection's weight as ``nn.Linear`` has it, (out, in): a view, whatever wraps the projection.

    Raises:
        ValueError: it is no plain linear map.
    """
    base: Any = unwrap(projection)
    weight = getattr(base, "weight", None)
    if weight is not None and is_quantized(weight):
        raise ValueError(
            f"The FFN has a quantized weight ({type(base).__name__}), which cannot be cut into blocks; load the model "
            "without quantization, or leave its FFNs dense with SptConfig(ffn=False)."
        )
    if type(base) in (nn.Linear, OneDnnLinear):
        return base.weight
    if type(base) is Conv1D:
        return base.weight.t()
    raise ValueError(
        f"The FFN has a {type(base).__name__} where a plain nn.Linear is expected; leave its FFNs dense with "
        "SptConfig(ffn=False)."
    )


def _in_layer(block: Block) -> FeedForward:
    layer, what = block.module, f"{block.name} ({type(block.module).__name__})"
    experts = [name for name, module in layer.named_modules() if "expert" in f"{name}.{type(module).__name__}".lower()]
    if experts:
        raise ValueError(
            f"{what} is a mixture of experts ({experts[0]}), of which a token uses a part already; leave the FFNs "
            "dense with SptConfig(ffn=False), or name the layers without experts by layers_to_transform."
        )
    modules = dict(layer.named_modules())
    found = [
        (name, names) for name, module in modules.items() for names in (*_LAYERS, *_MODULES) if _has(module, names)
    ]
    if not found:
        known = "; ".join(", ".join(part for part in names[:4] if part) for names in (*_MODULES, *_LAYERS))
        raise ValueError(
            f"{what} has no FFN of a known form (one of: {known}); leave the FFNs dense with SptConfig(ffn=False)."
        )
    if len(found) > 1:
        raise ValueError(
            f"{what} has {len(found)} FFNs, of which only one would become sparse; leave all dense with "
            "SptConfig(ffn=False)."
        )
    (name, names) = found[0]
    full_name = f"{block.name}.{name}" if name else block.name
    owner = modules[name]
    inner, hidden = weight_of(owner.get_submodule(names.up)).shape
    activation = attrgetter(names.activation)(owner)
    return FeedForward(owner, full_name, names, activation, (hidden, inner), block.is_decoder, names in _MODULES)


def _has(module: nn.Module, names: PartNames) -> bool:
    try:
        attrgetter(*(name for name in names if name is not None))(module)
    except AttributeError:
        return False
    return True
