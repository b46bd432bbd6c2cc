"""Search for each method's best recipe, on training data alone, with as many trials for every method.

    python -m sparsepeft_research.experiments.search_recipe --data-dir DATA [--methods spartan ...]

A trial is a set of settings; it is trained on 200 examples (``--few-shot``) of each task and scored on a tenth of the
training data that it never saw (``score_on="selection"``): the validation sets play no part. Results end up in
``research/results/search_STEPS/``, one file a run; a run whose result is there is not repeated, and several
processes may share the work. With ``--epochs`` a trial is trained on all training data (at most 10,000 examples) less
that tenth, and its result is in ``search_full_data/``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparsepeft.folders import write_json
from sparsepeft.training import RunConfig, train
from sparsepeft_research.results import RESULTS
from sparsepeft_research.tables.scores import recipe_search

TASKS = ("cola", "sst2", "stsb")

# MiniLM's pooler is in its checkpoint and so stays frozen, but it was not trained with it.
_POOLER = {"head_modules": ["bert.pooler", "classifier"]}


def _rates(*rates: float) -> dict[str, dict[str, Any]]:
    """Trials that differ in the learning rate alone."""
    return {f"lr{rate:.0e}".replace("e-0", "e-"): {"learning_rate": rate} for rate in rates}


# Keys are the recipe's or the method's config's. SPARTAN, Pfeiffer and full fine-tuning have equally many trials: eight
# chosen beforehand, then four around what was best. The trials with the pooler came later, and so did four rates for
# each of the other methods.
TRIALS: dict[str, dict[str, dict[str, Any]]] = {
    "spartan": {
        "lr3e-3": {"learning_rate": 3e-3},
        "lr1e-3": {"learning_rate": 1e-3},
        "lr1e-2": {"learning_rate": 1e-2},
        "lr3e-3-values": {"learning_rate": 3e-3, "value_initializer_range": 0.02},
        "lr3e-3-norms": {"learning_rate": 3e-3, "train_layer_norms": True},
        "lr3e-3-keys0.1": {"learning_rate": 3e-3, "initializer_range": 0.1},
        "lr3e-3-balance": {"learning_rate": 3e-3, "load_balancing_coef": 0.01},
        "lr3e-3-k16": {"learning_rate": 3e-3, "top_k": 16},
        "lr1e-3-norms": {"learning_rate": 1e-3, "train_layer_norms": True},
        "lr1e-3-norms-values": {"learning_rate": 1e-3, "train_layer_norms": True, "value_initializer_range": 0.02},
        "lr3e-3-norms-values": {"learning_rate": 3e-3, "train_layer_norms": True, "value_initializer_range": 0.02},
        "lr5e-3-norms-values": {"learning_rate": 5e-3, "train_layer_norms": True, "value_initializer_range": 0.02},
        "lr2e-3-norms-t1.6": {"learning_rate": 2e-3, "train_layer_norms": True, "temperature": 1.6},
        "lr3e-3-norms-values-upper3": {
            "learning_rate": 3e-3,
            "train_layer_norms": True,
            "value_initializer_range": 0.02,
            "layers_to_transform": [3, 4, 5],
        },
        "lr1e-3-norms-values-pooler": {
            "learning_rate": 1e-3,
            "train_layer_norms": True,
            "value_initializer_range": 0.02,
            **_POOLER,
        },
        "lr3e-3-norms-values-pooler": {
            "learning_rate": 3e-3,
            "train_layer_norms": True,
            "value_initializer_range": 0.02,
            **_POOLER,
        },
    },
    "pfeiffer": {
        "lr1e-3": {"learning_rate": 1e-3},
        "lr3e-4": {"learning_rate": 3e-4},
        "lr1e-4": {"learning_rate": 1e-4},
        "lr2e-3": {"learning_rate": 2e-3},
        "lr4e-3": {"learning_rate": 4e-3},
        "lr1e-3-r16": {"learning_rate": 1e-3, "reduction_factor": 16},
        "lr1e-3-r6": {"learning_rate": 1e-3, "reduction_factor": 6},
        "lr1e-3-init0.002": {"learning_rate": 1e-3, "initializer_range": 0.002},
        "lr5e-4": {"learning_rate": 5e-4},
        "lr3e-4-r6": {"learning_rate": 3e-4, "reduction_factor": 6},
        "lr3e-4-gelu": {"learning_rate": 3e-4, "non_linearity": "gelu"},
        "lr3e-4-constant": {"learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup"},
        "lr5e-4-pooler": {"learning_rate": 5e-4, **_POOLER},
        "lr1e-3-pooler": {"learning_rate": 1e-3, **_POOLER},
    },
    "full": {
        "lr5e-5": {"learning_rate": 5e-5},
        "lr2e-5": {"learning_rate": 2e-5},
        "lr1e-4": {"learning_rate": 1e-4},
        "lr2e-4": {"learning_rate": 2e-4},
        "lr3e-4": {"learning_rate": 3e-4},
        "lr5e-4": {"learning_rate": 5e-4},
        "lr1e-4-decay": {"learning_rate": 1e-4, "weight_decay": 0.1},
        "lr1e-4-warmup": {"learning_rate": 1e-4, "warmup_ratio": 0.2},
        "lr2e-4-warmup": {"learning_rate": 2e-4, "warmup_ratio": 0.2},
        "lr1e-4-constant": {"learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup"},
        "lr1e-4-cosine": {"learning_rate": 1e-4, "lr_scheduler_type": "cosine"},
        "lr2e-4-cosine": {"learning_rate": 2e-4, "lr_scheduler_type": "cosine"},
    },
    "houlsby": _rates(1e-4, 3e-4, 5e-4, 1e-3),
    "lora": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": _rates(1e-3, 5e-3, 1e-2, 3e-2),
    "bitfit": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "head": _rates(1e-3, 3e-3, 1e-2, 3e-2),
}


def main() -> None:
    """Run what is missing, then print each trial's mean over tasks and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(TRIALS))
    parser.add_argument("--trials", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--few-shot", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--epochs", type=float, help="train on all data, for so many passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for method in options.methods:
            for trial, settings in TRIALS[method].items():
                if options.trials and trial not in options.trials:
                    continue
                for task in options.tasks:
                    folder = "search_full_data" if options.epochs else f"search_{options.max_steps}"
                    file = RESULTS / folder / f"{method}-{trial}-{task}-{seed}.json"
                    _run_once(file, options, task, method, seed, settings)
    print(recipe_search(RESULTS))


def _run_once(
    file: Path, options: argparse.Namespace, task: str, method: str, seed: int, settings: dict[str, Any]
) -> None:
    """One run, unless its result is there or another process is at it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0), tempfile.TemporaryDirectory() as output:
            if file.exists():
                return
            rest = {key: value for key, value in settings.items() if key != "learning_rate"}
            config = RunConfig(
                task=task,
                method=method,
                seed=seed,
                output_dir=output,
                data_dir=options.data_dir,
                few_shot=None if options.epochs else options.few_shot,
                max_steps=None if options.epochs else options.max_steps,
                epochs=options.epochs,
                max_train_samples=10_000 if options.epochs else None,
                precision=options.precision,
                learning_rate=settings["learning_rate"],
                settings=rest,
                score_on="selection",
            )
            result = train(config)
            write_json(file, result)
            print(f"{file.stem:<40} {result['score']:.4f}  {result['train_seconds']:.0f} s", flush=True)
    except Timeout:
        return


if __name__ == "__main__":
    main()
