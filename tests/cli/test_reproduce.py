"""``sparsepeft reproduce`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft


@pytest.mark.slow
def test_a_matrix_from_plan_to_table(tiny_backbone: Path, tmp_path: Path) -> None:
    arguments = (
        *("reproduce", "table3", "--tasks", "topics", "--methods", "head,head", "--seeds", 1, "--seeds", "2"),
        *("--few-shot", 10, "--max-steps", 2, "--set", "max_length=32", "--model", tiny_backbone),
        *("--output-dir", tmp_path / "out"),
    )
    done = sparsepeft(*arguments, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = {run["name"]: run["state"] for run in json.loads(done.stdout)}
    assert planned == dict.fromkeys(("topics-head-1", "topics-head-2"), "pending")
    assert not (tmp_path / "out").exists()
    assert "There is no result" in sparsepeft(*arguments, "--table-only").stdout

    done = sparsepeft(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr
    assert all(name in done.stderr for name in planned)
    for words in ("Table 3", "head", "20.0", "Texts are cut to 32 tokens", "table3.svg"):
        assert words in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").glob("table3.*")) == [
        *("table3.csv", "table3.md", "table3.png", "table3.svg")
    ]
    table = json.loads(sparsepeft(*arguments, "--table-only", "--json").stdout)
    assert [row["method"] for row in table["rows"]] == ["head"]
    assert "2 of 2 runs are done." in sparsepeft(*arguments, "--dry-run").stdout


@pytest.mark.slow
def test_a_failed_run_ends_with_1_and_is_named(tiny_backbone: Path, tmp_path: Path) -> None:
    done = sparsepeft(
        *("reproduce", "table2", "--tasks", "topics", "--methods", "full", "--seeds", 1, "--few-shot", 10),
        *("--max-steps", 3, "--set", "learning_rate=1e35", "--model", tiny_backbone, "--output-dir", tmp_path),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "topics-full-1" in done.stderr.splitlines()[-1]
    assert "The loss became nan" in done.stderr


BAD = {
    "device": (["table2", "--device-throughput", "pi.json"], ["--device-throughput", "table1"]),
    "device file": (["table1", "--device-throughput", "none.json", "--tasks", "topics"], ["none.json", "--emulate"]),
    "unknown task": (["table2", "--tasks", "topics,tpics"], ["tpics", "did you mean 'topics'"]),
    "unknown method": (["table2", "--tasks", "topics", "--methods", "spartn"], ["spartn", "'spartan'"]),
    "seed": (["table2", "--seeds", "1,x"], ["--seeds x", "whole numbers"]),
    "few-shot of table 1": (["table1", "--few-shot", "3"], ["--few-shot 3", "table1"]),
    "epochs of table 2": (["table2", "--tasks", "topics", "--max-epochs", "3"], ["--max-epochs", "--max-steps"]),
    "no data": (["table2", "--tasks", "rte", "--data-dir", "/nowhere"], ["/nowhere", "does not exist"]),
    "setting": (["table2", "--tasks", "topics", "--set", "num_parent=3"], ["num_parent"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_one_sentence_before_any_run(case: str, tiny_backbone: Path, tmp_path: Path) -> None:
    arguments, words = BAD[case]
    done = sparsepeft("reproduce", *arguments, "--model", tiny_backbone, "--output-dir", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ")
    assert all(word in line for word in words)
    assert not (tmp_path / "out").exists()
