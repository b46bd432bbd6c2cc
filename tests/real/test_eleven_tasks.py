"""Nine tasks of GLUE, GoEmotions and WNUT-17 on one MPNet: a mixed batch of their own rows, each as the task alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.inference.conftest import save_task
from tests.real.models import METHODS, MPNET, find_model

from sparsepeft import MultiTaskEngine
from sparsepeft.inference import Prediction
from sparsepeft.tasks import TaskData, load_task
from sparsepeft.tasks.spec import GLUE_TASKS

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("SPARSEPEFT_DATA" not in os.environ, reason="SPARSEPEFT_DATA does not name a folder with data"),
]
TASKS = (*GLUE_TASKS, "goemotions", "wnut17")
NUM_ROWS = 6


@pytest.fixture(scope="module")
def data() -> dict[str, TaskData]:
    return {name: load_task(name, data_dir=os.environ["SPARSEPEFT_DATA"]) for name in TASKS}


@pytest.fixture(scope="module")
def folders(data: dict[str, TaskData], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A memory and a head with random values for each task."""
    root = tmp_path_factory.mktemp("tasks")
    folders = {}
    for seed, (name, one) in enumerate(data.items()):
        labels: dict[str, Any] = {"num_labels": one.spec.num_labels, "task_type": "SEQ_CLS"}
        if one.spec.label_names:
            labels["id2label"] = dict(enumerate(one.spec.label_names))
        if one.spec.labels_tokens:
            labels["task_type"] = "TOKEN_CLS"
        else:
            labels["problem_type"] = one.spec.problem_type
        folders[name] = save_task(find_model(MPNET), root / name, METHODS["spartan"](MPNET, **labels), seed)
    return folders


def rows(task: TaskData) -> list[Any]:
    texts = [task.validation[:NUM_ROWS][column] for column in task.spec.text_columns]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def check(found: Prediction, expected: Prediction) -> None:
    assert (found.error, expected.error) == (None, None)
    assert (found.label, found.labels) == (expected.label, expected.labels)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.score == pytest.approx(expected.score, abs=1e-4, nan_ok=True)
    places = [[(one.label, one.start, one.end) for one in each.entities or ()] for each in (found, expected)]
    assert places[0] == places[1]


def test_each_row_as_its_task_alone(data: dict[str, TaskData], folders: dict[str, Path]) -> None:
    engine = MultiTaskEngine(find_model(MPNET), folders)
    asked = [(name, rows(one)[place]) for place in range(NUM_ROWS) for name, one in data.items()]
    mixed = dict(zip(asked, engine.predict(asked), strict=True))
    assert {engine.tasks[name].problem_type for name in data} == {
        *("regression", "single_label_classification", "multi_label_classification", "token_classification")
    }
    for name, folder in folders.items():
        alone = MultiTaskEngine(find_model(MPNET), {name: folder}).predict([(name, text) for text in rows(data[name])])
        for text, expected in zip(rows(data[name]), alone, strict=True):
            check(mixed[name, text], expected)
