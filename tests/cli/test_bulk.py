"""``sparsepeft predict --input``: what is said, how it ends, and how it goes on after it was killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.test_cli import ran, refused, sparsepeft
from tests.inference.conftest import TASKS, save_task
from tests.tiny import topics_rows, write_jsonl

from sparsepeft.bulk import BulkReport
from sparsepeft_cli.terminal import bulk_progress
from sparsepeft_cli.terminal.interrupts import Stop

pytestmark = pytest.mark.slow
NUM_FILES, ROWS = 24, [{"text": row["text"].lower()} for row in topics_rows("train")[:100]]


@pytest.fixture(scope="module")
def home(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks, and texts in many files."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("two", "degree"):
        save_task(tiny_backbone, folder / "tasks" / name, TASKS[name])
    (folder / "texts").mkdir()
    for number in range(NUM_FILES):
        write_jsonl(folder / "texts" / f"{number:02}.jsonl", ROWS)
    (folder / "model").symlink_to(tiny_backbone)
    return folder


def arguments(home: Path, output: Path, files: str = "*.jsonl") -> list[object]:
    return [
        *("predict", "--tasks-dir", home / "tasks", "--model", home / "model"),
        *("--input", home / "texts" / files, "--output", output, "--text-column", "text"),
    ]


def test_a_killed_run_goes_on_where_it_was(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparsepeft_cli", *map(str, arguments(home, out)), "--token-budget", "64"]
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as process:
        while len(list(out.glob("*.jsonl"))) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert 3 <= len(first) < NUM_FILES
    done = ran(*arguments(home, out), "--token-budget", 64, "--json")
    report = json.loads(done.stdout)
    assert (report["skipped"], report["files"]) == (len(first), NUM_FILES - len(first))
    assert report["rows"] == len(ROWS) * report["files"]
    assert f"{len(first)} were there" in done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    assert len({path.read_bytes() for path in out.glob("*.jsonl")}) == 1  # as their inputs
    assert len(list(out.iterdir())) == NUM_FILES + 1  # and the note on how they were made
    rows = [json.loads(line) for line in (out / "00.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    assert set(rows[0]) == {"text", "two_label", "two_score", "two_scores", "degree_score"}


def test_what_failed_is_said_and_the_exit_code_is_1(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n \n")
    (tmp_path / "b.csv").write_text("text\na,b\n")
    task = ("--task", f"two={home / 'tasks' / 'two'}", "--model", home / "model", "--output", tmp_path / "out")
    done = sparsepeft("predict", *task, "--input", tmp_path / "*.csv", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["failed"] == 1
    assert "b.csv was not answered: " in done.stderr
    assert done.stderr.splitlines()[-1] == "Error: 1 files could not be read, and 1 rows not be answered."
    done = ran("predict", *task, "--input", tmp_path / "a.csv")
    assert "0 files written" in done.stderr
    words = "holds answers made with --dtype fp32; pass another --output, or --overwrite to answer all files anew"
    refused("predict", *task, "--input", tmp_path / "a.csv", "--dtype", "bfloat16", words=words)


def test_what_it_refuses(home: Path, tmp_path: Path) -> None:
    two, files = home / "tasks" / "two", ("--input", home / "texts" / "00.jsonl")
    for given, words in (
        ((two, *files), "without --output"),
        ((two, "a text", *files, "--output", tmp_path / "out"), "TEXT does not go with --input"),
        ((two, *files, "--output", tmp_path / "out", "--infer", "dense"), "--infer does not go with --input"),
        ((*files, "--output", tmp_path / "out"), "either FOLDER or tasks by --task"),
        ((two, *files, "--output", tmp_path / "out", "--task", f"a={two}"), "either FOLDER or tasks by --task"),
        ((two, *files, "--output", tmp_path / "out", "--workers", 2), "--workers goes with --ray"),
        ((two, "a text", "--ray"), "--ray goes with --input"),
        (("--task", f"a={two}"), "--task goes with --input"),
        ((), "Pass the FOLDER of a run"),
    ):
        refused("predict", *given, words=[words])


def test_progress_is_a_bar_or_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    report, screen, lines = BulkReport(rows=1000, files=3, seconds=2.0), io.StringIO(), list[str]()
    monkeypatch.setattr(bulk_progress, "err", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(bulk_progress, "say", lines.append)
    stop = Stop()
    with contextlib.suppress(Stop), bulk_progress.BulkProgress() as progress:
        progress.show(report, 0.25)
        raise stop
    assert str(stop) == "Interrupted with 3 files written; the same command goes on from there."
    assert "25%" in screen.getvalue()
    assert "1,000 rows, 500 a second" in screen.getvalue()
    monkeypatch.setattr(bulk_progress, "err", Console(file=screen))
    monkeypatch.setattr(bulk_progress, "_LINE_SECONDS", 0.0)
    with bulk_progress.BulkProgress() as progress:
        progress.show(report, 0.25)
    assert [line.split("  ")[1:] for line in lines] == [["25.0%", "1,000 rows, 500 a second", "ETA 6 s"]]
