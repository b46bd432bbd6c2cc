"""AdapterHub's side of the benchmark ``finetuning``: trains step by step, on command, in the peer's environment.

    python training.py SETTINGS.json

Says ``{"preparation_s": ...}`` when it is ready; then each line with a number runs that many steps and is answered by
``{"steps": ..., "loss": ...}``. A bare loop (forward, backward, clipping, optimizer, scheduler) without the work that a
Trainer does around it, which favours the peer.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import adapters
import torch
import transformers
from safetensors.torch import load_file

STYLES = {"pfeiffer": adapters.SeqBnConfig, "houlsby": adapters.DoubleSeqBnConfig}


def main() -> None:
    """Prepare, then obey."""
    start = time.perf_counter()
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    transformers.set_seed(settings["seed"])
    step = training_step(settings)
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


def training_step(settings: dict) -> Callable[[], float]:
    """Return a function that does one step and returns its loss."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=settings["num_labels"]
    )
    adapters.init(model)
    model.add_adapter("task", config=STYLES[settings["style"]](reduction_factor=settings["reduction_factor"]))
    model.train_adapter("task")
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As transformers' Trainer chooses it.
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, settings["max_steps"])
    batches = endless_batches(load_file(settings["examples"]), settings)

    def step() -> float:
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
