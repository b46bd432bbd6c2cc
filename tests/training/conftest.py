"""Finished runs that the tests of training share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import run_config

from sparsepeft.training import train


@pytest.fixture(scope="session")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict]]:
    """Folder and results of a run of 12 steps with some values of its config; each is trained once, and left alone."""
    runs: dict[str, tuple[Path, dict]] = {}

    def run(**changes: Any) -> tuple[Path, dict]:
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[key] = folder, train(run_config(tiny_backbone, folder, **changes))
        return runs[key]

    return run


@pytest.fixture
def finished(trained: Callable[..., tuple[Path, dict]], tmp_path: Path) -> Path:
    """A copy of a finished SPARTAN run, for a test to change."""
    return Path(shutil.copytree(trained(method="spartan")[0], tmp_path / "finished"))
