"""A tiny backbone, tasks that share a graph, and their exports in float32 and int8."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.inference.conftest import save_task
from tests.tiny import run_config, topics_rows, write_jsonl

from sparsepeft import SpartanConfig
from sparsepeft.export import export_tasks
from sparsepeft.training import train

MEMORY = {"num_children": 2, "top_k": 3, "train_layer_norms": True}
# Other numbers of labels, parents and children; the same top_k.
TASKS: dict[str, dict[str, Any]] = {
    "two": {"num_labels": 2, "num_parents": 6},
    "five": {"num_labels": 5, "num_parents": 9, "num_children": 3},
    "degree": {"num_labels": 1, "num_parents": 6},
}
RUNS = ("topics", "tags", "likeness")  # one label, several labels, a value for a pair of texts


@pytest.fixture(scope="session")
def backbone(tiny_backbone: Path) -> Path:
    return tiny_backbone


@pytest.fixture(scope="session")
def folders(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tasks as ``save_pretrained`` leaves them, and runs of a few steps."""
    root = tmp_path_factory.mktemp("tasks")
    saved = {
        name: save_task(backbone, root / name, SpartanConfig(**(MEMORY | {"task_type": "SEQ_CLS"} | values)))
        for name, values in TASKS.items()
    }
    rows = topics_rows("train")[:60]
    tags = [
        {"text": row["text"], "tags": [row["label"], "long" if len(row["text"]) > 138 else "short"]} for row in rows
    ]
    pairs = [
        {"a": one["text"], "b": two["text"], "score": float(one["label"] == two["label"]) + 0.25}
        for one, two in pairwise(rows)
    ]
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "score", "problem_type": "regression"}
    values: dict[str, dict[str, Any]] = {
        "topics": {"max_length": 16},
        "tags": {"train_file": str(write_jsonl(root / "tags.jsonl", tags)), "label_column": "tags"},
        "likeness": {"train_file": str(write_jsonl(root / "likeness.jsonl", pairs)), **columns},
    }
    for name in RUNS:
        task = "topics" if name == "topics" else "custom"
        settings = MEMORY | {"num_parents": 6}
        train(run_config(backbone, root / name, task=task, max_steps=4, settings=settings, **values[name]))
    return saved | {name: root / name for name in RUNS}


def _exported(kind: str, **options: Any) -> Any:
    """A fixture: the folder of all tasks, exported with some options."""

    @pytest.fixture(scope="session")
    def folder(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        if kind == "openvino":
            pytest.importorskip("openvino", reason='needs OpenVINO: pip install "sparsepeft[export-openvino]"')
        folder = tmp_path_factory.mktemp("export") / kind
        export_tasks(list(folders.values()), folder, **options)
        return folder

    return folder


exported = _exported("float32")
exported_int8 = _exported("int8", int8=True)
exported_openvino = _exported("openvino", format="openvino")
