"""SPARTAN against a trained head alone on six tasks, MiniLM, two epochs: is the memory worth its bytes?

    python experiments/six_tasks.py --data-dir DATA [--methods head spartan] [--seeds 42]

Each run is what this command does, and its results end up in ``experiments/results/six_tasks/``:

    sparsepeft train --task T --method M --max-train-samples 8000 --epochs 2 --data-dir DATA --output-dir O

A run whose result is there is not repeated. ``--set`` tries other settings; give those another ``--name``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from sparsepeft.provenance import write_json
from sparsepeft.training import RunConfig, parse_settings, train

RESULTS = Path(__file__).parent / "results"
TASKS = ("sst2", "bbc-news", "rte", "mrpc", "stsb", "cola")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--name", default="six_tasks")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=["head", "spartan"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-train-samples", type=int, default=8000)
    parser.add_argument("--max-length", type=int, help="cut texts to this many tokens; default: what the model takes")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    folder = RESULTS / options.name
    for task in options.tasks:
        for method in options.methods:
            for seed in options.seeds:
                file = folder / f"{task}-{method}-{seed}.json"
                if not file.exists():
                    write_json(file, _run(options, task, method, seed))
                result = json.loads(file.read_text())
                print(
                    f"{task:<9} {method:<8} seed {seed}  {result['main_metric']:<22} {result['score']:.4f} on "
                    f"{result['score_split']}, chosen at {result['selection_score']:.4f}, "
                    f"{result['train_seconds']:.0f} s",
                    flush=True,
                )
    print(_summary(folder))


def _run(options: argparse.Namespace, task: str, method: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as output:
        config = RunConfig(
            task=task,
            method=method,
            seed=seed,
            output_dir=output,
            data_dir=options.data_dir,
            epochs=options.epochs,
            max_train_samples=options.max_train_samples,
            max_length=options.max_length,
            learning_rate=options.learning_rate,
            settings=parse_settings(options.settings),
        )
        return train(config)


def _summary(folder: Path) -> str:
    """Mean score per method over the tasks (mean over seeds first)."""
    scores: dict[str, dict[str, list[float]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        scores.setdefault(result["method"], {}).setdefault(result["task"], []).append(result["score"])
    lines = []
    for method, tasks in scores.items():
        means = [sum(values) / len(values) for values in tasks.values()]
        lines.append(f"{method:<8} mean of {len(means)} tasks: {sum(means) / len(means):.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
