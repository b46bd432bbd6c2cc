"""A memory trained for a moment, as ``sparsepeft train`` leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparsepeft.training import RunConfig, train

    folder = tmp_path_factory.mktemp("inspected") / "topics"
    settings = {"num_parents": 4, "num_children": 2, "top_k": 2, "value_initializer_range": 0.0}
    model = str(tiny_backbone)
    train(RunConfig(task="topics", model=model, output_dir=str(folder), max_steps=60, settings=settings))
    return folder
