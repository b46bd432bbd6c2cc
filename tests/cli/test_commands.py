"""``sparsepeft data``, ``export`` and ``inspect`` as a person meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused

from sparsepeft_cli.export import _parts

pytestmark = pytest.mark.slow


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    texts = [f"Größe {number} fehlt, bitte nachsenden" for number in range(40)]
    texts += ["", "Größe 1 fehlt, bitte nachsenden"]
    rows = "".join(f"{number};{text};{'ja' if number % 3 else 'nein'}\n" for number, text in enumerate(texts))
    path = tmp_path / "tickets.csv"
    path.write_bytes(f"id;text;dringend\n{rows}".encode("cp1252"))
    return path


def test_data_of_a_file(tickets: Path, tiny_backbone: Path) -> None:
    done = ran("data", tickets, "--model", tiny_backbone, "--label-column", "dringend")
    for words in ("semicolon", "cp1252", "not used: id", "--max-length 16", "duplicate texts 1", "pass --encoding"):
        assert words in done.stdout
    done = ran("data", tickets, "--model", tiny_backbone, "--json")
    about = json.loads(done.stdout)
    assert about["rows"] == 42
    assert about["columns"] == {"text": ["text"], "label": "dringend", "found": ["id", "text", "dringend"]}
    assert about["files"] == {
        "train": {"name": "tickets.csv", "format": "CSV", "delimiter": "semicolon", "encoding": "cp1252"}
    }
    assert sum(part["empty_texts"] for part in about["parts"].values()) == 1
    assert about["tokens"]["limit"] == 64
    assert 3 < about["tokens"]["median"] < about["tokens"]["suggested"] == 16


def test_tasks_of_values_and_of_several_labels(tiny_backbone: Path, tmp_path: Path) -> None:
    done = ran("data", "--task", "topics", "--model", tiny_backbone)
    assert "science" in done.stdout
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {n}", "score": {n / 8}}}\n' for n in range(40)))
    done = ran("data", tmp_path / "a.jsonl", "--model", tiny_backbone, "--json")
    assert json.loads(done.stdout)["parts"]["train"]["labels"]["greatest"] == pytest.approx(4.9, abs=0.5)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "t", "tags": ["a", "b{n % 2}"]}}\n' for n in range(40)))
    done = ran("data", tmp_path / "b.jsonl", "--model", tiny_backbone, "--label-column", "tags", "--json")
    part = json.loads(done.stdout)["parts"]["train"]
    assert part["labels"]["a"] == part["rows"] == part["duplicates"] + 1


def test_export(topics_run: Path, tmp_path: Path) -> None:
    options = ("--int8", "--split", "test", "--max-examples", 9)
    done = ran("export", topics_run, "--output-dir", tmp_path / "out", *options, "--json")
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["tasks"]["topics"]["num_texts"] == 9
    assert report["tasks"]["topics"]["checked_on"] == "the task's test set"
    table, hint = _parts(report, tmp_path / "out", "test")  # what is printed without --json
    assert list(table.columns[-3:]) == ["fp32", "int8 tasks", "int8"]
    assert hint == f'next: python {tmp_path / "out" / "run.py"} topics "some text"'
    run_py = [sys.executable, str(tmp_path / "out" / "run.py"), "topics", "The striker scored twice."]
    answered = subprocess.run(run_py, capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)["label"] in ("business", "health", "science", "sport", "travel")
    refused("export", topics_run, "--output-dir", tmp_path / "out", words="--overwrite")


def test_inspect(topics_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "inspection"
    done = ran("inspect", topics_run, "--output-dir", output, "--compare-untrained")
    for words in ("120 documents", "parents of bert.encoder.layer.1", "untrained", "purity", str(output)):
        assert words in done.stdout
    assert (output / "inspection.html").is_file()
    done = ran("inspect", topics_run, "--json", "--layer", 0, "--split", "validation", "--max-examples", 12)
    report = json.loads(done.stdout)
    assert [layer["name"] for layer in report["layers"]] == ["bert.encoder.layer.0"]
    assert report["source"]["examples"] == 12
    assert len(report["layers"][0]["parents"]) == 4
