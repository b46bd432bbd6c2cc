"""Which tensor of ours is which of AdapterHub's."""

from __future__ import annotations

from peft import PeftModel

from sparsepeft.tuners.bottleneck import BottleneckLayer

# Our places, and AdapterHub's modules of a BERT-like layer that hold its adapters.
PLACES = {
    "bottleneck_attention": "attention.output.adapters",
    "bottleneck_ffn": "output.adapters",
    "bottleneck_output": "output.adapters",
}
LINEARS = {"down": "adapter_down.0", "up": "adapter_up"}


def peer_names(model: PeftModel, peer_adapter: str = "peer") -> dict[str, str]:
    """Map each trained parameter of a BERT-like ``model`` to its name in AdapterHub's model."""
    names = {}
    for block_name, block in model.named_modules():
        if not isinstance(block, BottleneckLayer):
            continue
        for place, theirs in PLACES.items():
            for ours, linear in LINEARS.items():
                for kind in ("weight", "bias"):
                    own = f"{block_name}.{place}.default.{ours}.{kind}"
                    base = block_name.removeprefix("base_model.model.")
                    names[own] = f"{base}.{theirs}.{peer_adapter}.{linear}.{kind}"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = {
        name: name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in trained
        if ".modules_to_save." in name
    }
    return {name: names[name] for name in trained if name in names} | head
