"""Candidates in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsepeft_research.benchmarks.timing import sample_alternating
from sparsepeft_research.benchmarks.workers import Worker

_ECHO = """
import json, os, sys
print(json.dumps({"threads": os.environ["OMP_NUM_THREADS"]}), flush=True)
for line in sys.stdin:
    if line == "die\\n":
        sys.exit("it was told to")
    print(json.dumps({"ms": float(line)}), flush=True)
open(sys.argv[1], "w").close()
"""


def test_a_worker_answers_line_by_line_and_ends_in_peace(tmp_path: Path) -> None:
    with Worker([sys.executable, "-c", _ECHO, str(tmp_path / "ended")], 3, tmp_path / "log") as worker:
        assert worker.ready == {"threads": "3"}
        samples = sample_alternating(
            {"slow": lambda: worker.ask(8), "fast": lambda: worker.ask("2")},
            repeats=2,
            warm_up=0,
            idle_wait_s=0.0,
            clock=lambda ask: float(ask()["ms"]),  # what the process says of itself, not how long the answer took
        )
        assert samples == {"slow": [8.0, 8.0], "fast": [2.0, 2.0]}
    assert (tmp_path / "ended").exists()


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ECHO, str(tmp_path / "ended")]
    with (
        Worker(command, 1, tmp_path / "log") as worker,
        pytest.raises(RuntimeError, match="code 1 and said last: it was told to"),
    ):
        worker.ask("die")
    with pytest.raises(RuntimeError, match="code 3 and said last: nothing"):
        Worker([sys.executable, "-c", "raise SystemExit(3)"], 1, tmp_path / "log")
