"""``sparsepeft data`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, sparsepeft

pytestmark = pytest.mark.slow


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    texts = [f"Größe {number} fehlt, bitte nachsenden" for number in range(40)] + [
        "",
        "Größe 1 fehlt, bitte nachsenden",
    ]
    rows = "".join(f"{number};{text};{'ja' if number % 3 else 'nein'}\n" for number, text in enumerate(texts))
    path = tmp_path / "tickets.csv"
    path.write_bytes(f"id;text;dringend\n{rows}".encode("cp1252"))
    return path


def test_a_file(tickets: Path, tiny_backbone: Path) -> None:
    done = ran("data", tickets, "--model", tiny_backbone, "--label-column", "dringend")
    for words in ("semicolon", "cp1252", "not used: id", "--max-length 16", "duplicate texts 1", "pass --encoding"):
        assert words in done.stdout
    done = sparsepeft("data", tickets, "--model", tiny_backbone, "--json")
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
    done = sparsepeft("data", tmp_path / "a.jsonl", "--model", tiny_backbone, "--json")
    assert json.loads(done.stdout)["parts"]["train"]["labels"]["greatest"] == pytest.approx(4.9, abs=0.5)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "t", "tags": ["a", "b{n % 2}"]}}\n' for n in range(40)))
    done = sparsepeft("data", tmp_path / "b.jsonl", "--model", tiny_backbone, "--label-column", "tags", "--json")
    part = json.loads(done.stdout)["parts"]["train"]
    assert part["labels"]["a"] == part["rows"] == part["duplicates"] + 1
