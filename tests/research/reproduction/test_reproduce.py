"""``sparsepeft reproduce`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, sparsepeft


@pytest.mark.slow
def test_a_matrix_from_plan_to_table(tiny_backbone: Path, tmp_path: Path) -> None:
    arguments = (
        *("reproduce", "table3", "--tasks", "topics", "--methods", "head,head", "--seeds", 1, "--seeds", "2"),
        *("--few-shot", 10, "--max-steps", 2, "--set", "max_length=32", "--set", "head.learning_rate=2e-3"),
        *("--model", tiny_backbone),
        *("--output-dir", tmp_path / "out"),
    )
    done = ran(*arguments, "--dry-run", "--json")
    planned = {run["name"]: run["state"] for run in json.loads(done.stdout)}
    assert planned == dict.fromkeys(("topics-head-1", "topics-head-2"), "pending")
    assert not (tmp_path / "out").exists()
    assert "There is no result" in sparsepeft(*arguments, "--table-only").stdout

    done = ran(*arguments)
    assert "2/2" in done.stderr
    assert all(name in done.stderr for name in planned)
    for words in ("Table 3", "head", "20.0", "Texts are cut to 32 tokens", "rate=0.002", "table3.svg"):
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
