"""``sparsepeft export`` as a person meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "topics"
    arguments = ("train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", 4)
    done = sparsepeft(*arguments)
    assert done.returncode == 0, done.stderr
    return folder


def test_export(trained: Path, tmp_path: Path) -> None:
    done = sparsepeft("export", trained, "--output-dir", tmp_path / "out", "--int8", "--max-examples", 20)
    assert done.returncode == 0, done.stderr
    for words in ("topics", "deviation", "fp32", "int8 tasks", f"python {tmp_path / 'out' / 'run.py'} topics"):
        assert words in done.stdout
    run_py = [sys.executable, str(tmp_path / "out" / "run.py"), "topics", "The striker scored twice."]
    answered = subprocess.run(run_py, capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)["label"] in ("business", "health", "science", "sport", "travel")
    done = sparsepeft("export", trained, "--output-dir", tmp_path / "out", "--overwrite", "--json", "--max-examples", 9)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "export.json").read_text())
    assert json.loads(done.stdout)["tasks"]["topics"]["num_texts"] == 9


def test_failures(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    out = ("--output-dir", tmp_path / "out")
    for arguments, code, words in (
        ((), 2, "Missing argument"),
        ((trained,), 2, "--output-dir"),
        ((tmp_path, *out), 2, "holds no adapter"),
        ((damaged, *out), 2, "could not be loaded"),
        ((trained, *out, "--format", "tflite"), 2, "valid are executorch, onnx, openvino"),
        ((trained, *out, "--format", "executorch", "--int8"), 2, "needs example texts"),
        ((trained, "--output-dir", trained), 2, "holds other files (README.md, adapter_config.json and "),
        ((trained, *out, "--tolerance", "1e-12", "--max-examples", 5), 1, "deviates from PyTorch"),
    ):
        done = sparsepeft("export", *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
