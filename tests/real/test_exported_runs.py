"""Three real tasks on MiniLM, exported: a text, a pair of texts, and a value for a pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepeft.export import export_tasks
from sparsepeft.runs.config import RunConfig
from sparsepeft.tasks import load_task
from sparsepeft.training import train

TASKS = ("sst2", "rte", "stsb")
MOST = 64  # texts of a task


@pytest.mark.real
def test_validation_sets_get_pytorchs_answers(data_dir: Path, tmp_path: Path) -> None:
    values = {"data_dir": str(data_dir), "max_steps": 2, "max_train_samples": 32, "max_length": 48}
    for task in TASKS:
        train(RunConfig(task=task, output_dir=str(tmp_path / task), score_on="selection", **values))
    folders = [tmp_path / task for task in TASKS]
    for task, found in export_tasks(folders, tmp_path / "out", tolerance=1e-4, max_examples=MOST)["tasks"].items():
        assert found["checked_on"] == "the task's validation set"
        assert found["num_texts"] == min(MOST, len(load_task(task, data_dir=data_dir).validation))
        assert found["num_other_labels"] == 0
        assert found["max_deviation"] <= 1e-4
