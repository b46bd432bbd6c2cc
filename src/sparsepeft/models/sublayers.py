"""Where the attention and the FFN of a Transformer layer are, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsepeft.models.blocks import Block, find_blocks, named_modules, unwrap
from sparsepeft.models.identity import is_quantized
from sparsepeft.models.modes import in_mode
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
    # Modules, or probabilities by which the FFN drops itself:
    inner_dropout: str | None = None  # between activation and down projection
    outer_dropout: str | None = None  # behind the down projection


# A module that is nothing but an FFN, a layer that has the FFN's parts among others, and names that are used in both.
# The first form is taken that a module has and that computes what the module does.
_MODULES = (
    PartNames("gate_proj", "up_proj", "down_proj", "act_fn", inner_dropout="dropout"),  # GTE, T5Gemma
    PartNames("gate_proj", "up_proj", "down_proj", "act_fn", outer_dropout="residual_dropout"),  # Seed-OSS
    PartNames("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama, Mistral, Qwen, Gemma
    PartNames("wi_0", "wi_1", "wo", "act", inner_dropout="dropout"),  # T5 v1.1
    PartNames(None, "wi", "wo", "act", inner_dropout="dropout"),  # T5
    PartNames(None, "c_fc", "c_proj", "act", outer_dropout="dropout"),  # GPT-2
    PartNames(None, "c_fc", "c_proj", "act", outer_dropout="residual_dropout"),  # StarCoder2
)
_LAYERS = (
    PartNames(None, "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"),  # BERT, RoBERTa
)
_EITHER = (
    PartNames(None, "fc1", "fc2", "activation_fn", inner_dropout="activation_dropout"),  # BART, Whisper
    PartNames(None, "fc1", "fc2", "activation_fn"),  # OPT, CLIP
)
_FORMS = (*_EITHER, *_LAYERS, *_MODULES)
_SCALES = (1.0, 10.0, 100.0, 1000.0)  # of states that a form is tried on


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


def compute_feed_forward(
    owner: nn.Module, names: PartNames, activation: Callable[[Tensor], Tensor], hidden_states: Tensor
) -> Tensor:
    """What an FFN computes, through its parts and what PEFT has put around them: (..., D) -> (..., D)."""
    inner = activation(owner.get_submodule(names.gate or names.up)(hidden_states))
    if names.gate is not None:
        inner = inner * owner.get_submodule(names.up)(hidden_states)
    output: Tensor = owner.get_submodule(names.down)(drop(owner, names.inner_dropout, inner))
    return drop(owner, names.outer_dropout, output)


def drop(owner: nn.Module, name: str | None, states: Tensor) -> Tensor:
    """States behind the dropout of this name, a module or a probability; as they are where there is none."""
    dropout: Any = 0.0 if name is None else attrgetter(name)(owner)
    return dropout(states) if isinstance(dropout, nn.Module) else F.dropout(states, dropout, owner.training)


def _in_layer(block: Block) -> FeedForward:
    layer, what = block.module, f"{block.name} ({type(block.module).__name__})"
    experts = [name for name, module in layer.named_modules() if "expert" in f"{name}.{type(module).__name__}".lower()]
    if experts:
        raise ValueError(
            f"{what} is a mixture of experts ({experts[0]}), of which a token uses a part already; leave the FFNs "
            "dense with SptConfig(ffn=False), or name the layers without experts by layers_to_transform."
        )
    modules = dict(layer.named_modules())
    found, others = [], []
    for name, module in modules.items():
        forms = [names for names in _FORMS if _has(module, names)]
        is_known = [names for names in forms if not _is_alone(module, layer, names) or _computes(module, names)]
        found += [(name, names) for names in is_known[:1]]
        others += [type(module).__name__] if forms and not is_known else []
    if others:
        raise ValueError(
            f"{what} has an FFN ({others[0]}) that computes more than projections and activation, such as a norm, a "
            "factor or a dropout between them, which a sparse FFN would leave out; leave the FFNs dense with "
            "SptConfig(ffn=False), or name other layers by layers_to_transform."
        )
    if not found:
        known = "; ".join(dict.fromkeys(", ".join(part for part in names[:4] if part) for names in _FORMS))
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


def _is_alone(owner: nn.Module, layer: nn.Module, names: PartNames) -> bool:
    """Whether an owner of these parts is nothing but the FFN, so that it can be run."""
    return names in _MODULES or (names in _EITHER and owner is not layer)


@torch.no_grad()
def _computes(owner: nn.Module, names: PartNames) -> bool:
    """Whether a module computes what its parts say, tried in training mode, with dropout, on small and large states.

    Large ones since some clamp what is large. What cannot be tried is believed.
    """
    weights = [weight_of(owner.get_submodule(name)) for name in (names.gate, names.up, names.down) if name]
    if any(weight.is_meta or hasattr(weight, "full_tensor") for weight in weights):  # offloaded, or sharded
        return True
    if len({weight.dtype for weight in weights}) > 1:  # T5 in float16 keeps a projection in float32
        return True
    up = weights[-2]
    states = torch.randn(1, len(_SCALES), up.shape[1], generator=torch.Generator().manual_seed(0))
    states = (states * torch.tensor(_SCALES)[:, None]).to(up)
    kind, devices = ("cuda", []) if up.device.type == "cpu" else (up.device.type, [up.device.index or 0])
    outputs: list[Any] = []
    with in_mode(owner, training=True):
        for function in (owner, partial(compute_feed_forward, owner, names, attrgetter(names.activation)(owner))):
            with torch.random.fork_rng(devices, device_type=kind):
                torch.manual_seed(0)
                try:
                    outputs.append(function(states))
                except (TypeError, RuntimeError):  # it takes more than states, or cuts them into parts
                    return False
    expected, actual = outputs
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return False
    is_real = expected.isfinite().all(-1)  # what is large may become too large
    expected, actual = expected[is_real].float(), actual[is_real].float()
    allowed = torch.finfo(up.dtype).eps ** 0.5  # the same sums may be rounded elsewhere
    return bool(((actual - expected).norm(dim=-1) <= allowed * expected.norm(dim=-1)).all())
