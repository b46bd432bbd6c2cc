"""AdapterHub's ``adapters`` as its users run it, in an environment of its own: ``python peer.py SETTINGS.json``."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import partial
from typing import Any

import adapters
import torch
import transformers
from serving import load_batches, serve

STYLES = {"pfeiffer": adapters.SeqBnConfig, "houlsby": adapters.DoubleSeqBnConfig}


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the backbone and add a fresh adapter with random values; ready to run the plans."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(settings["model"])
    adapters.init(model)
    model.add_adapter("task", config=STYLES[settings["style"]](reduction_factor=settings["reduction_factor"]))
    model.set_active_adapters("task")
    model = model.to(getattr(torch, settings["precision"])).eval()
    passes = {plan["name"]: partial(run, model, load_batches(plan["tensors"])) for plan in settings["plans"]}
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers")}
    attention = getattr(model.config, "_attn_implementation", None)
    versions |= {"python": platform.python_version(), "torch": torch.__version__}
    return passes, {"versions": versions, "threads": torch.get_num_threads(), "attention": attention}


@torch.inference_mode()
def run(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Logits of every batch."""
    return [model(**batch).logits for batch in batches]


if __name__ == "__main__":
    serve(prepare)
