"""``sparsepeft inspect`` and ``sparsepeft reproduce figure2`` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "sparsepeft[plots]"')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "topics"
    arguments = ("train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", 4)
    done = sparsepeft(*arguments, "--set", "num_parents=4", "--set", "top_k=2")
    assert done.returncode == 0, done.stderr
    return folder


def test_inspect(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "inspection"
    done = sparsepeft("inspect", trained, "--output-dir", output, "--compare-untrained")
    assert done.returncode == 0, done.stderr
    for words in ("120 documents", "parents of bert.encoder.layer.1", "untrained", "purity", str(output)):
        assert words in done.stdout
    assert (output / "inspection.html").is_file()
    done = sparsepeft("inspect", trained, "--json", "--layer", 0, "--split", "validation", "--max-examples", 12)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [layer["name"] for layer in report["layers"]] == ["bert.encoder.layer.0"]
    assert report["source"]["examples"] == 12
    assert len(report["layers"][0]["parents"]) == 4


def test_bad_input_ends_with_2_and_one_sentence(trained: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    arguments = ("train", "--task", "topics", "--method", "head", "--model", tiny_backbone, "--max-steps", 1)
    assert sparsepeft(*arguments, "--output-dir", head).returncode == 0
    for arguments, words in (
        ((tmp_path,), ["run.json is missing"]),
        ((head,), ["HEAD", "has no SPARTAN memory", "the method spartan"]),
        ((trained, "--layer", 9), ["--layer 9", "0, 1"]),
        ((trained, "--split", "tset"), ["'tset' is unknown", "did you mean 'test'"]),
    ):
        done = sparsepeft("inspect", *arguments)
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert all(word in line for word in words), line
        assert "Traceback" not in done.stderr
    assert sparsepeft("inspect", trained, "--max-examples", 0).returncode == 2


def test_figure2_names_what_is_wrong(tmp_path: Path) -> None:
    for arguments, words in (
        (("--data-dir", tmp_path / "none"), ["does not exist"]),
        (("--set", "num_parent=3"), ["did you mean 'num_parents'"]),
        (("--top-k", 6), ["top_k=6", "num_parents=5"]),
    ):
        done = sparsepeft("reproduce", "figure2", "--output-dir", tmp_path / "out", *arguments)
        assert done.returncode == 2, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
