"""Search for each method's best recipe, on training data alone, with as many trials for every method.

    python -m sparsepeft_research.experiments.search_recipe --data-dir DATA [--methods spartan ...]

A trial is a set of settings; it is trained on 200 examples (``--few-shot``) of each task and scored on a tenth of the
training data that it never saw (``score_on="selection"``): the validation sets play no part. Results end up in
``research/results/search_STEPS/``, one file a run; a run whose result is there is not repeated, and several
processes may share the work. With ``--epochs`` a trial is trained on all training data (at most 10,000 examples) less
that tenth, and its result is in ``search_full_data/``. With ``--model`` these folders are in one of the model's name.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS
from sparsepeft_research.tables.scores import recipe_search

TASKS = ("cola", "sst2", "stsb")

# What a part of a trial's name stands for: keys of the recipe or of the method's config. MiniLM's pooler is in its
# checkpoint and so stays frozen, but it was not trained with it.
PARTS: dict[str, dict[str, Any]] = {
    "values": {"value_initializer_range": 0.02},
    "norms": {"train_layer_norms": True},
    "slownorms": {"train_layer_norms": True, "norms_learning_rate": 2e-4},
    "keys0.1": {"initializer_range": 0.1},
    "init0.002": {"initializer_range": 0.002},
    "balance": {"load_balancing_coef": 0.01},
    "k2": {"top_k": 2},
    "k4": {"top_k": 4},
    "k16": {"top_k": 16},
    "p64": {"num_parents": 64},
    "c8": {"num_children": 8},
    "t0.25": {"temperature": 0.25},
    "t1.6": {"temperature": 1.6},
    "upper3": {"layers_to_transform": [3, 4, 5]},
    "upper6": {"layers_to_transform": [6, 7, 8, 9, 10, 11]},
    "attention": {"target_modules": r".*\.layer\.\d+(\.attention)?"},  # a memory after it, too: of BERT and its kin
    "pooler": {"head_modules": ["bert.pooler", "classifier"]},
    "r6": {"reduction_factor": 6},
    "r16": {"reduction_factor": 16},
    "gelu": {"non_linearity": "gelu"},
    "head1e-4": {"head_learning_rate": 1e-4},
    "head3e-4": {"head_learning_rate": 3e-4},
    "head1e-3": {"head_learning_rate": 1e-3},
    "constant": {"lr_scheduler_type": "constant_with_warmup"},
    "cosine": {"lr_scheduler_type": "cosine"},
    "decay": {"weight_decay": 0.1},
    "warmup": {"warmup_ratio": 0.2},
}
# SPARTAN, Pfeiffer and full fine-tuning have equally many trials: eight chosen beforehand, then four around what was
# best. The trials with the pooler came later, and so did four rates for each of the other methods.
TRIALS = {
    "spartan": "lr3e-3 lr1e-3 lr1e-2 lr3e-3-values lr3e-3-norms lr3e-3-keys0.1 lr3e-3-balance lr3e-3-k16 lr1e-3-norms "
    "lr1e-3-norms-values lr3e-3-norms-values lr5e-3-norms-values lr2e-3-norms-t1.6 lr3e-3-norms-values-upper3 "
    "lr1e-3-norms-values-pooler lr3e-3-norms-values-pooler",
    "pfeiffer": "lr1e-3 lr3e-4 lr1e-4 lr2e-3 lr4e-3 lr1e-3-r16 lr1e-3-r6 lr1e-3-init0.002 lr5e-4 lr3e-4-r6 lr3e-4-gelu "
    "lr3e-4-constant lr5e-4-pooler lr1e-3-pooler",
    "full": "lr5e-5 lr2e-5 lr1e-4 lr2e-4 lr3e-4 lr5e-4 lr1e-4-decay lr1e-4-warmup lr2e-4-warmup lr1e-4-constant "
    "lr1e-4-cosine lr2e-4-cosine",
    "houlsby": "lr1e-4 lr3e-4 lr5e-4 lr1e-3",
    "lora": "lr3e-4 lr1e-3 lr3e-3 lr1e-2",
    "ia3": "lr1e-3 lr5e-3 lr1e-2 lr3e-2",
    "bitfit": "lr3e-4 lr1e-3 lr3e-3 lr1e-2",
    "head": "lr1e-3 lr3e-3 lr1e-2 lr3e-2",
}


def values_of(trial: str) -> tuple[float, dict[str, Any]]:
    """Learning rate and settings of a trial: ``"lr3e-3-norms"``."""
    rate, parts = re.fullmatch(r"lr(\de-\d)(?:-(.+))?", trial).groups()  # type: ignore[union-attr]
    settings: dict[str, Any] = {}
    for part in re.findall(r"head\de-\d|[^-]+", parts or ""):
        settings |= PARTS[part]
    return float(rate), settings


def main() -> None:
    """Run what is missing, then print each trial's mean over tasks and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", help="a hub id or a folder; MiniLM by default")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(TRIALS))
    parser.add_argument("--trials", nargs="+", help="others than the methods' own may be made up, such as lr5e-4-k16")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--few-shot", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--epochs", type=float, help="train on all data, for so many passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = RESULTS if options.model is None else RESULTS / Path(options.model).name
    for seed in options.seeds:
        for method in options.methods:
            for trial in options.trials or TRIALS[method].split():
                for task in options.tasks:
                    folder = "search_full_data" if options.epochs else f"search_{options.max_steps}"
                    file = results / folder / f"{method}-{trial}-{task}-{seed}.json"
                    run_once(file, partial(_run, options, task, method, seed, trial))
    print(recipe_search(results))


def _run(options: argparse.Namespace, task: str, method: str, seed: int, trial: str) -> dict[str, Any]:
    rate, settings = values_of(trial)
    with tempfile.TemporaryDirectory() as output:
        config = RunConfig(
            task=task,
            method=method,
            model=options.model,
            seed=seed,
            output_dir=output,
            data_dir=options.data_dir,
            few_shot=None if options.epochs else options.few_shot,
            max_steps=None if options.epochs else options.max_steps,
            epochs=options.epochs,
            max_train_samples=10_000 if options.epochs else None,
            precision=options.precision,
            learning_rate=rate,
            settings=settings,
            score_on="selection",
        )
        return train(config)


if __name__ == "__main__":
    main()
