"""Run what is missing of some kinds of runs.

python -m sparsepeft_research.experiments.spt_quality conversion finetuning --data-dir DATA --model GEMMA
python -m sparsepeft_research.experiments.spt_quality lm starts encoder --data-dir DATA --model LLAMA
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from sparsepeft.devices import keep_freed_memory
from sparsepeft_research.experiments import run_once, spt_quality
from sparsepeft_research.experiments.spt_quality import budget, conversion, finetuning, small
from sparsepeft_research.results import RESULTS

KINDS = {
    "conversion": conversion.runs,
    "finetuning": finetuning.runs,
    "budget": budget.runs,
    "lm": small.language_models,
    "starts": small.starts,
    "encoder": small.encoders,
}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=spt_quality.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--data-dir", type=Path, required=True, help="with bbc-news, wikitext-2 and the GLUE tasks")
    parser.add_argument("--model", help="the language model: folder or hub id; for budget also minilm")
    parser.add_argument("--settings", nargs="+", help="only these, by their names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="of what is random, in this order")
    parser.add_argument("--steps", type=int, help="of training, instead of the kind's")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="conversion, budget: of the blocks")
    parser.add_argument("--learning-rate", type=float, default=finetuning.LEARNING_RATE, help="finetuning: of LoRA")
    parser.add_argument("--scored-tokens", type=int, default=1 << 14, help="of held-out text, or a little less")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS / "spt_quality", help="folder of the results")
    options = parser.parse_args(arguments)
    if options.model is None and options.kinds != ["encoder"]:
        parser.error("--model is needed for all kinds but encoder")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as work:
        for run in (run for kind in options.kinds for run in KINDS[kind](options)):
            if run.about["setting"] in (options.settings or [run.about["setting"]]):
                run_once(options.results / f"{run.name}.json", partial(run.measure, Path(work)), run.about)


if __name__ == "__main__":
    main()
