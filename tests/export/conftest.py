"""A tiny backbone, tasks that share a graph, and their exports in float32 and int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.inference.conftest import save_task

from sparsepeft import SpartanConfig
from sparsepeft.export import export_tasks

MEMORY = {"num_children": 2, "top_k": 3, "train_layer_norms": True, "task_type": "SEQ_CLS"}
# Other numbers of labels, parents and children; the same top_k.
TASKS: dict[str, dict[str, Any]] = {
    "two": {"num_labels": 2, "num_parents": 6},
    "five": {"num_labels": 5, "num_parents": 9, "num_children": 3},
    "degree": {"num_labels": 1, "num_parents": 6},
}


@pytest.fixture(scope="session")
def backbone(tiny_backbone: Path) -> Path:
    return tiny_backbone


@pytest.fixture(scope="session")
def folders(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tasks")
    return {name: save_task(backbone, root / name, SpartanConfig(**(MEMORY | own))) for name, own in TASKS.items()}


@pytest.fixture(scope="session")
def exported(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "float32"
    export_tasks(list(folders.values()), folder)
    return folder


@pytest.fixture(scope="session")
def exported_int8(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "int8"
    export_tasks(list(folders.values()), folder, int8=True)
    return folder


@pytest.fixture(scope="session")
def exported_openvino(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino", reason='needs OpenVINO: pip install "sparsepeft[export-openvino]"')
    folder = tmp_path_factory.mktemp("export") / "openvino"
    export_tasks(list(folders.values()), folder, format="openvino")
    return folder
