"""Six real tasks on the real MiniLM, on their whole validation sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsepeft.export import export_tasks
from sparsepeft.runs.config import RunConfig
from sparsepeft.tasks import load_task
from sparsepeft.training import train

TASKS = ("sst2", "mrpc", "rte", "cola", "stsb", "bbc-news")


@pytest.mark.slow
def test_whole_validation_sets_get_pytorchs_answers(data_dir: Path, tmp_path: Path) -> None:
    values = {"data_dir": str(data_dir), "max_steps": 4, "max_train_samples": 64, "max_length": 48}
    for task in TASKS:
        train(RunConfig(task=task, output_dir=str(tmp_path / task), **values))
    export_tasks([tmp_path / task for task in TASKS], tmp_path / "out", tolerance=1e-4)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    for task in TASKS:
        found = report["tasks"][task]
        assert found["checked_on"] == "the task's validation set"
        assert found["num_texts"] == len(load_task(task, data_dir=data_dir).validation)
        assert found["num_other_labels"] == 0
        assert found["max_deviation"] <= 1e-4
