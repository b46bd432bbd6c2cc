"""Where more cells help a task: QNLI and MNLI on MiniLM, product keys of 16 to 65,536 parents beside 16 flat ones.

    python -m sparsepeft_research.experiments.large_memories --data-dir DATA            # learning rates, then scores
    python -m sparsepeft_research.experiments.large_memories --data-dir DATA --table    # what is there so far

All memories are trained for equally many steps of equal batches, in the same layers. First each size is trained at
several learning rates and scored on a tenth of the training data that it never saw (``score_on="selection"``), unless
there is one rate alone; then, at the best of these, with several seeds and scored on the validation set. A result goes
to ``research/results/large_memories/``; one that is there is not repeated, and several processes may share the work.

A memory of 65,536 parents has 0.6 GB in each layer, and up to twice that in moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS

TASKS = ("qnli", "mnli")
# Keys and number of parents, the baseline first.
MEMORIES = {"flat-16": ("flat", 16)} | {f"product-{p}": ("product", p) for p in (16, 256, 1024, 4096, 65536)}
RATES = (3e-4, 1e-3, 3e-3)
FOLDER = RESULTS / "large_memories"


def main() -> None:
    """Run what is missing, then print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 5], help="those of MiniLM's six with a memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the result files")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table and options.data_dir is None:
        parser.error("--data-dir is needed, unless --table is given")
    for task in () if options.table else options.tasks:
        for memory in options.memories:
            best = _search(options, task, memory) if len(options.rates) > 1 else options.rates[0]
            if best is None:  # another process is at it
                continue
            for seed in options.seeds:
                file = options.folder / f"{task}-{memory}-{seed}.json"
                run_once(file, partial(_run, options, task, memory, best, seed, "validation"))
    print("\n".join(table(options.folder)))


def _search(options: argparse.Namespace, task: str, memory: str) -> float | None:
    for rate in options.rates:
        file = options.folder / "rates" / f"{task}-{memory}-lr{rate:g}.json"
        run_once(file, partial(_run, options, task, memory, rate, options.seeds[0], "selection"))
    return best_rate(options.folder, task, memory)


def _run(options: argparse.Namespace, task: str, memory: str, rate: float, seed: int, score_on: str) -> dict[str, Any]:
    parent_keys, num_parents = MEMORIES[memory]
    with tempfile.TemporaryDirectory() as output:
        config = RunConfig(
            task=task,
            method="spartan",
            seed=seed,
            output_dir=output,
            data_dir=options.data_dir,
            max_steps=options.max_steps,
            eval_steps=max(1, options.max_steps // 4),  # each writes the whole memory
            precision=options.precision,
            learning_rate=rate,
            settings={"parent_keys": parent_keys, "num_parents": num_parents, "layers_to_transform": options.layers},
            score_on=score_on,
        )
        return train(config)


def best_rate(folder: Path, task: str, memory: str) -> float | None:
    """The learning rate with the best score on the selection part; None before there is a result."""
    scores = {
        float(file.stem.rpartition("-lr")[2]): json.loads(file.read_text())["score"]
        for file in sorted((folder / "rates").glob(f"{task}-{memory}-lr*.json"))
    }
    return max(scores, key=scores.__getitem__, default=None)


def table(folder: Path) -> Iterator[str]:
    """A line for each task and memory with results: seeds, scores on the validation set, the rate that was chosen."""
    for task in TASKS:
        for memory in MEMORIES:
            runs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{task}-{memory}-*.json"))]
            if runs:
                scores = [run["score"] for run in runs]
                rates = sorted({run["hyperparameters"]["learning_rate"] for run in runs})
                spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
                yield (
                    f"{task:<6}{memory:<16}{statistics.mean(scores):.4f}{spread}  "
                    f"{len(scores)} seeds, rate {', '.join(f'{rate:g}' for rate in rates)}"
                )


if __name__ == "__main__":
    main()
