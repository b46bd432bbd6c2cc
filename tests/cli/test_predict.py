"""A trained run is asked and scored as one does in the first week: tables, pipes, other folders."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused, sparsepeft

pytestmark = pytest.mark.slow
WORDS = {"good": "a fine film", "bad": "a dull film"}


@pytest.fixture(scope="module")
def home(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, trained from there on ``mine.csv`` and a copy of the backbone by relative paths."""
    folder = tmp_path_factory.mktemp("home")
    rows = ["id,review,mood"] + [f"{i},{WORDS[mood]} {i},{mood}" for i in range(30) for mood in WORDS]
    (folder / "mine.csv").write_text("\n".join(rows) + "\n")
    (folder / "model").symlink_to(tiny_backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran(
            *("train", "--train-file", "mine.csv", "--text-column", "review", "--label-column", "mood"),
            *("--model", "model", "--output-dir", "run", "--max-steps", 3),
        )
    return folder


def test_a_run_is_used_from_any_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ran("evaluate", home / "run", "--json", "--output", "scores.json")
    results = json.loads((home / "run" / "results.json").read_text())
    found = json.loads(done.stdout)
    assert found["validation"] == results["metrics"]["validation"]
    assert found["num_rows"] == {"validation": 6}
    assert found["data_fingerprints"] == results["data_fingerprints"]
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert {path.stat().st_mode & 0o044 for path in (home / "run").rglob("*")} == {0o044}  # others may read all of it
    assert str(home) not in (home / "run" / "results.json").read_text()
    assert {"precision", "recall", "f1", "support"} <= found["report"]["validation"]["per_class"]["good"].keys()


def test_predict_answers_a_table_row_by_row(home: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("id,mood,review\n7,good,a fine film\n8,?,\n9,bad,a dull one\n")
    done = sparsepeft("predict", home / "run", "--file", tmp_path / "new.csv", "--device", "cpu")
    assert done.returncode == 1
    assert "1 of 3 inputs could not be answered" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["7", "8", "9"]
    assert set(rows[0]) == {"id", "mood", "review", "label", "score", "scores"}
    assert "empty text" in rows[1]["error"]
    again = sparsepeft("predict", home / "run", "--file", tmp_path / "new.csv", "--output", tmp_path / "answers.csv")
    assert again.returncode == 1
    assert again.stdout == ""
    with (tmp_path / "answers.csv").open() as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == [rows[0]["label"], "", rows[2]["label"]]
    (tmp_path / "other.csv").write_text("id,opinion\n7,a fine film\n")
    for arguments, words in (
        (("--file", tmp_path / "other.csv"), ["which column is the text?", "'id', 'opinion'"]),
        (("--file", tmp_path / "new.csv", "--output", tmp_path / "new.csv"), ["is the input"]),
    ):
        refused("predict", home / "run", *arguments, words=words)
    ran("predict", home / "run", "--file", tmp_path / "other.csv", "--text-column", "opinion")


def test_predict_answers_lines_as_they_come_and_ends_with_its_reader(home: Path) -> None:
    command = [sys.executable, "-m", "sparsepeft_cli", "predict", str(home / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for line, keys in (
            (b"a fine film\n", {"label", "score", "scores"}),
            (b"\n", {"error"}),
            (b'{"review": "dull", "id": 5}\n', {"review", "id", "label", "score", "scores"}),
            (b"\xff\n", {"error"}),
        ):
            process.stdin.write(line)
            process.stdin.flush()
            assert set(json.loads(process.stdout.readline())) == keys  # while the pipe stays open
        process.stdout.close()
        process.stdin.write(b"another\n")
        process.stdin.flush()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_evaluate_scores_a_file_with_the_labels_of_the_run(home: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("mood,text\ngood,a fine film\ngood,a dull film\nbad,a dull film\n")
    done = ran("evaluate", home / "run", "--test-file", tmp_path / "other.csv", "--json")
    found = json.loads(done.stdout)
    assert found["num_rows"] == {"test": 3}
    matrix = found["report"]["test"]["confusion_matrix"]
    assert [sum(row) for row in matrix] == [1, 2]
    assert matrix[0][0] + matrix[1][1] == round(3 * found["test"]["accuracy"])
    done = sparsepeft("evaluate", home / "run", "--test-file", home / "mine.csv", "--report")
    assert "is the file that the run was trained on" in " ".join(done.stdout.split())
    assert "confusions of test" in done.stdout
    (tmp_path / "unknown.csv").write_text("mood,text\nmixed,a fine film\n")
    for arguments, words in (
        (("--test-file", tmp_path / "unknown.csv"), ["'mixed' is no label", "'bad', 'good'"]),
        (
            ("--test-file", tmp_path / "other.csv", "--label-column", "topic"),
            ["--label-column topic was given, but the columns are 'mood', 'text'"],
        ),
        (("--label-column", "topic"), ["--test-file"]),
    ):
        refused("evaluate", home / "run", *arguments, words=words)


def test_what_is_gone_is_named_with_its_option(home: Path) -> None:
    for name, option in (("mine.csv", "--test-file"), ("model", "--model")):
        (home / name).rename(home / "elsewhere")
        refused("evaluate", home / "run", words=[f"{home / name}, which is not there any more", option])
        (home / "elsewhere").rename(home / name)
