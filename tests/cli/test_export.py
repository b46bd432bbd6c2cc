"""``sparsepeft export`` as a person meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft

from sparsepeft_cli.export import _parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "topics"
    arguments = ("train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", 4)
    done = sparsepeft(*arguments)
    assert done.returncode == 0, done.stderr
    return folder


def test_export(trained: Path, tmp_path: Path) -> None:
    done = sparsepeft("export", trained, "--output-dir", tmp_path / "out", "--int8", "--max-examples", 9, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["tasks"]["topics"]["num_texts"] == 9
    table, hint = _parts(report, tmp_path / "out")  # what is printed without --json
    assert list(table.columns[-3:]) == ["fp32", "int8 tasks", "int8"]
    assert hint == f'next: python {tmp_path / "out" / "run.py"} topics "some text"'
    run_py = [sys.executable, str(tmp_path / "out" / "run.py"), "topics", "The striker scored twice."]
    answered = subprocess.run(run_py, capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)["label"] in ("business", "health", "science", "sport", "travel")
    again = sparsepeft("export", trained, "--output-dir", tmp_path / "out")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_failures(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    out = ("--output-dir", tmp_path / "out")
    for arguments, words in (
        ((trained,), "--output-dir"),
        ((tmp_path, *out), "holds no adapter"),
        ((damaged, *out), "could not be loaded"),
        ((trained, *out, "--format", "executorch", "--int8"), "needs example texts"),
    ):
        done = sparsepeft("export", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
