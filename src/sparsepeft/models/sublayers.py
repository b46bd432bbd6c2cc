"""Finding the places in a Transformer layer where a sublayer's output meets its residual."""

from __future__ import annotations

from torch import nn

from sparsepeft.models.blocks import unwrap

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
    "activation_fn.fc2 activation_fn",  # the same made sparse: the routed FFN stands where the activation was
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
    modules = {path: module for path, module in _named(block, "") if path}
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


def _named(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """``named_modules`` through PEFT's wrappers."""
    module = unwrap(module)
    found = [(prefix, module)]
    for name, child in module.named_children():
        found += _named(child, f"{prefix}.{name}" if prefix else name)
    return found
