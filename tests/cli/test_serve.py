"""``sparsepeft serve`` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.cli.test_cli import sparsepeft
from tests.inference.conftest import TASKS, save_task


@pytest.mark.slow
def test_a_service_is_started_asked_and_stopped(tiny_backbone: Path, tmp_path: Path) -> None:
    save_task(tiny_backbone, tmp_path / "two", TASKS["two"])
    command = [sys.executable, "-m", "sparsepeft_cli", "serve", "--model", tiny_backbone, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--tasks-dir", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    address = re.search(r"answers at (http://127\.0\.0\.1:\d+)", process.stderr.readline())
    assert address, process.stderr.read()
    answer = httpx.post(f"{address[1]}/predict", json={"inputs": "the striker scored twice"})
    assert [set(one) for one in answer.json()] == [{"label", "score"}] * 2
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert '"path": "/predict", "status": 200' in err
    assert "striker" not in err


def test_what_it_refuses(tmp_path: Path) -> None:
    for arguments, words in (
        (("--host", "0.0.0.0"), "no --token-file says who may ask"),
        (("--task", "two"), "expected NAME=FOLDER"),
        (("--tasks-dir", tmp_path / "none"), "cannot be read"),
        (("--task", f"a={tmp_path}", "--device", "abacus"), "--device abacus was given"),
        (("--token-file", tmp_path / "none"), "cannot be read"),
    ):
        done = sparsepeft("serve", *arguments)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())
