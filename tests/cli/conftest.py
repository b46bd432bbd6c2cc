"""One trained run for the commands that use one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.test_cli import ran


@pytest.fixture(scope="session")
def topics_run(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the method spartan on the built-in sample, with four parents."""
    folder = tmp_path_factory.mktemp("trained") / "topics"
    ran(
        *("train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", 8, "--json"),
        *("--set", "num_parents=4", "--set", "top_k=2"),
    )
    return folder
