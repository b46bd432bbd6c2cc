"""``sparsepeft benchmark``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft

pytestmark = pytest.mark.slow


def test_spt(tiny_language_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "spt.json"
    command = ["benchmark", "spt", "--model", tiny_language_model, "--layers", "1", "--lengths", "32", "--repeats", "2"]
    command += ["--num-blocks", "4", "--active-blocks", "2", "--threads", "1", "--output", output]
    done = sparsepeft(*command)
    assert done.returncode == 0, done.stderr
    for words in ("1 x 32 tokens", "sdpa, checkpointing", "both 2/4", "peak MiB", "FFN"):
        assert words in done.stdout
    report = json.loads(output.read_text())
    assert report["environment"]["versions"]["torch"]
    assert report["settings"]["active_blocks"] == [2]
    assert "both 2/4" in report["results"][0]["candidates"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--lengths", "many"], "--lengths"), (["--model", "opt-1025"], "opt-1024"), (["--repeats", "1"], "repeats=1")],
)
def test_bad_input(arguments: list[str], words: str) -> None:
    done = sparsepeft("benchmark", "spt", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert words in done.stderr
