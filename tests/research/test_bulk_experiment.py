"""Bulk scoring measured: a process answers what was prepared for it, and the tables show what the files hold."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sparsepeft_research.experiments.bulk import KINDS, _prepare, _resident, answer
from sparsepeft_research.results import Result, write_result
from sparsepeft_research.tables import bulk

MACHINE = {"commit": "abc", "date": "2026-01-01", "versions": {}, "cpu": "a processor", "threads": 1, "logical_cpus": 2}


@pytest.mark.slow
def test_a_process_answers_the_texts_and_notes_its_rate(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(model=str(tiny_backbone), num_tasks=2, seed=0, dtype="fp32")
    settings = _prepare(options, tmp_path, 5_000)
    more = {"out": str(tmp_path / "out"), "workers": None, "result": str(tmp_path / "result.json")}
    (tmp_path / "settings.json").write_text(json.dumps(settings | more))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "settings.json")])
    answer()
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["rows_per_second"] > 0
    assert (found["with_start"]["rows"], found["with_start"]["failed"]) == (5_000, 0)
    assert {"task0_label", "task1_label"} <= set(pq.read_schema(tmp_path / "out" / "texts.parquet").names)
    assert _resident(1 << 30) == [(0.0, False)]  # which is not there


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    assert bulk.speed(tmp_path) == bulk.memory(tmp_path) == "Not measured yet."
    about = {"model": "minilm", "tasks": 1, "dtype": "bf16", "rows": 98_304, "threads": 1}
    rates = {name: {"median": 1000.0 * number, "runs": [999.0, 1001.0]} for number, name in enumerate(KINDS, 1)}
    speed = Result("bulk-speed", about | {"repeats": 2}, {"rows_per_second": rates, "scaling": 0.95}, MACHINE, 0)
    write_result(tmp_path / "bulk" / "speed.json", speed)
    peak = {"peak_mib": {"process": 500.0, "largest_worker": 0.0, "all": 500.0}}
    for rows in (10_000, 1_000_000):
        memory = Result("bulk-memory", about | {"kind": "one process", "rows": rows}, peak, MACHINE, 0)
        write_result(tmp_path / "bulk" / f"memory-{rows}-one-process.json", memory)
    assert "| two workers | 3,000 | 999, 1,001 |" in bulk.speed(tmp_path)
    assert "Two workers answer 1.90 times the rows of one." in bulk.speed(tmp_path)
    lines = bulk.memory(tmp_path).splitlines()
    assert lines[-2:] == [
        "| one process, 10,000 rows | 500 | 0 | 500 |",
        "| one process, 1,000,000 rows | 500 | 0 | 500 |",
    ]
