"""Small matrices of runs: real ones on the built-in sample, and runs whose results are written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepeft.runs.files import RESULTS_VERSION
from sparsepeft.training.callbacks import Watcher
from sparsepeft_research.reproduction import Matrix, Run
from sparsepeft_research.reproduction.matrix import TaskFacts
from sparsepeft_research.reproduction.protocols import few_shot, full_data
from sparsepeft_research.reproduction.results import about

FACTS = TaskFacts(num_train=1000, mean_chars=50.0, fingerprints={"train.tsv": "sha256:0"})


def small_matrix(backbone: Path, folder: Path, **changes: Any) -> Matrix:
    """Few-shot runs of four steps on the built-in sample."""
    values = {"model": str(backbone), "recipe": "paper", "max_steps": 4, **changes.pop("values", {})}
    given = {"tasks": ["topics"], "methods": ["spartan", "head"], "seeds": [1, 2], "protocol": "few-shot"}
    return Matrix(**(given | {"num_examples": 10, "output_dir": folder, "values": values} | changes))


def hand_made_run(
    folder: Path, task: str, method: str, seed: int, protocol: str = "full-data", model: str = "minilm", **values: Any
) -> Run:
    """A run that nobody has done; its backbone is never loaded."""
    name = f"{task}-{method}-{seed}"
    make = full_data if protocol == "full-data" else few_shot
    config = make(task, method, seed, folder / "work" / name, **({"recipe": "paper", "model": model} | values))
    return Run(name, folder, config, model, FACTS)


def hand_made_result(run: Run, score: float, /, **changes: Any) -> dict[str, Any]:
    """A result as ``train`` would have returned it, written to the run's file."""
    config = {k: v for k, v in run.config.to_dict().items() if k not in ("output_dir", "data_dir", "model")}
    result = {
        "format_version": RESULTS_VERSION,
        "task": run.config.task,
        "method": run.config.method,
        "seed": run.config.seed,
        "score": score,
        "score_split": "validation",
        "main_metric": "accuracy",
        "metrics": {"validation": {"accuracy": score}},
        "parameters": {"trained": 300, "head": 100, "adapter": 200},
        "saved_bytes": 1300,
        "model_bytes": 10_000,
        "model": run.model,
        "num_cut": 0,
        "train_seconds": 30.0,
        "others_cpu_share": 0.02,
        "steps": 100,
        "environment": {"cpu": "a processor", "threads": 1},
        "notes": [],
        "data_fingerprints": run.facts.fingerprints,
        "config": config,
        "reproduction": about(run, 40.0, resumed=False),
    } | changes
    run.result_file.parent.mkdir(parents=True, exist_ok=True)
    run.result_file.write_text(json.dumps(result), encoding="utf-8")
    return result


class Recorder(Watcher):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.here: list[str] = []
        self.there: list[str] = []
        self.failures: dict[str, dict[str, Any]] = {}

    def finished(self, run: str, result: dict[str, Any], here: bool) -> None:
        (self.here if here else self.there).append(run)

    def failed(self, run: str, error: dict[str, Any]) -> None:
        self.failures[run] = error


def names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]
