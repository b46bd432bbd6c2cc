"""One candidate of the benchmark ``finetuning``: a run as ``sparsepeft train`` does it, step by step on command.

    python -m sparsepeft_research.benchmarks.finetuning_process SETTINGS.json

Says ``{"preparation_s": ...}`` before the first step; then each line with a number runs that many steps and is answered
by ``{"steps": ...}``. The run ends when its input does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from sparsepeft.training import RunConfig, train


class Gate(TrainerCallback):
    """Lets a run go on for as many steps as the next line of the input says."""

    def __init__(self, answers: TextIO, random_order: bool) -> None:
        self.answers, self.random_order = answers, random_order
        self.start = time.perf_counter()
        self.asked = self.left = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take batches in random order instead of by length, where that is to be measured."""
        if self.random_order:
            args.train_sampling_strategy = "random"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer and wait, when the steps that were asked for are done."""
        if self.left == 0:
            seconds = time.perf_counter() - self.start
            self._say({"steps": self.asked} if self.asked else {"preparation_s": seconds})
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self.asked = self.left = int(line)
        self.left -= 1

    def _say(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self.answers, flush=True)


def main() -> None:
    """Train until nobody asks for more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    train(RunConfig(**settings["config"]), callbacks=[Gate(answers, settings["random_order"])])


if __name__ == "__main__":
    main()
