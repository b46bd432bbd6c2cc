"""Tasks to serve, and texts to ask them for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparsepeft.backbones import resolve_model
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.tasks import load_task
from sparsepeft_research.benchmarks.inference.systems import save_task

TOLERANCE = 1e-4  # between the scores of a text alone and among others


def save_tasks(model: str | None, root: Path, count: int, seed: int) -> dict[str, Path]:
    """Save SPARTAN tasks of the paper's sizes, each of other random values: what they answer differs, not its cost."""
    folders = {}
    for number in range(count):
        torch.manual_seed(seed + number)
        inner = save_task(resolve_model(model), root / f"saved{number}")
        folders[f"task{number}"] = inner.rename(root / f"task{number}")
    return folders


def texts(data_dir: Path) -> list[str]:
    """Of real lengths: SST-2's validation part, 872 sentences of 25 tokens on average."""
    task = load_task("sst2", data_dir=data_dir)
    return list(task.validation[task.spec.text_columns[0]])


def expected_scores(
    model: str | None, folders: dict[str, Path], inputs: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """What the engine itself answers, by task: the scores of each text's labels."""
    engine = MultiTaskEngine(resolve_model(model), folders)
    rows = engine.predict_all(list(inputs))
    return {name: [dict(row[name].scores) for row in rows] for name in folders}


def is_close(given: Mapping[str, float], scores: Mapping[str, float]) -> bool:
    """Whether the scores of an answer are these, by label."""
    return given.keys() == scores.keys() and all(abs(given[name] - scores[name]) < TOLERANCE for name in scores)
