"""AdapterHub's side of the benchmark ``finetuning``: trains step by step, on command, in the peer's environment.

    python training.py SETTINGS.json

Says ``{"preparation_s": ...}`` when it is ready; then each line with a number runs that many steps and is answered by
``{"steps": ..., "loss": ...}``. A bare loop (forward, backward, clipping, optimizer, scheduler) without the work that a
Trainer does around it, which favours the peer. Our side runs the same loop for its bare steps.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
import transformers
from safetensors.torch import load_file

# Where a backbone has what AdapterHub's adapters need, for those that its library does not know by itself.
INTERFACES = {
    "mpnet": {
        "adapter_methods": ["bottleneck"],
        "model_embeddings": "embeddings",
        "model_layers": "encoder.layer",
        "layer_self_attn": "attention",
        "layer_cross_attn": None,
        "attn_q_proj": "attn.q",
        "attn_k_proj": "attn.k",
        "attn_v_proj": "attn.v",
        "attn_o_proj": "attn.o",
        "layer_intermediate_proj": "intermediate.dense",
        "layer_output_proj": "output.dense",
        "layer_pre_self_attn": "attention",
        "layer_pre_ffn": "intermediate",
        "layer_ln_1": "attention.LayerNorm",
        "layer_ln_2": "output.LayerNorm",
    }
}


def main() -> None:
    """Train AdapterHub's."""
    train_on_command(peer_model)


def train_on_command(make_model: Callable[[dict], torch.nn.Module]) -> None:
    """Prepare the model that the settings ask for, then obey."""
    start = time.perf_counter()
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    transformers.set_seed(settings["seed"])
    step = training_step(make_model(settings), settings)
    say(answers, preparation_s=time.perf_counter() - start)
    for line in sys.stdin:
        for _ in range(int(line)):
            loss = step()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss became {loss}, so a speed would mean nothing; lower the learning rate")
        say(answers, steps=int(line), loss=loss)


def say(answers: TextIO, **content: float) -> None:
    """Answer with one line."""
    print(json.dumps(content), file=answers, flush=True)


def peer_model(settings: dict) -> torch.nn.Module:
    """A model with AdapterHub's adapter of the style."""
    import adapters  # which only the peer's environment has

    styles = {"pfeiffer": adapters.SeqBnConfig, "houlsby": adapters.DoubleSeqBnConfig}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=settings["num_labels"]
    )
    interface = INTERFACES.get(model.config.model_type)
    adapters.init(model, interface=interface and adapters.AdapterModelInterface(**interface))
    model.add_adapter("task", config=styles[settings["style"]](reduction_factor=settings["reduction_factor"]))
    model.train_adapter("task")
    return model


def training_step(model: torch.nn.Module, settings: dict) -> Callable[[], float]:
    """Return a function that does one step and returns its loss; ``precision`` bf16 is autocast."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As transformers' Trainer chooses it.
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, settings["max_steps"])
    batches = endless_batches(load_file(settings["examples"]), settings)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def endless_batches(examples: dict[str, torch.Tensor], settings: dict) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in random order, epoch after epoch, padded to their longest example or to a fixed length."""
    lengths = examples["attention_mask"].sum(1)
    while True:
        for rows in torch.randperm(len(lengths)).split(settings["batch_size"]):
            length = settings["pad_to"] or int(lengths[rows].max())
            yield {key: value[rows, :length] if value.dim() == 2 else value[rows] for key, value in examples.items()}


if __name__ == "__main__":
    main()
