"""``sparsepeft export`` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused

from sparsepeft_cli.export import _parts

pytestmark = pytest.mark.slow


def test_export(topics_run: Path, tmp_path: Path) -> None:
    done = ran("export", topics_run, "--output-dir", tmp_path / "out", "--int8", "--max-examples", 9, "--json")
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["tasks"]["topics"]["num_texts"] == 9
    table, hint = _parts(report, tmp_path / "out")  # what is printed without --json
    assert list(table.columns[-3:]) == ["fp32", "int8 tasks", "int8"]
    assert hint == f'next: python {tmp_path / "out" / "run.py"} topics "some text"'
    run_py = [sys.executable, str(tmp_path / "out" / "run.py"), "topics", "The striker scored twice."]
    answered = subprocess.run(run_py, capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)["label"] in ("business", "health", "science", "sport", "travel")
    refused("export", topics_run, "--output-dir", tmp_path / "out", words="--overwrite")
