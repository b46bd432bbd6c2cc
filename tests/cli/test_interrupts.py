"""Training in processes of its own: signals, two starts at once, going on, and what is seen without a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, sparsepeft

from sparsepeft.folders import UNFINISHED
from sparsepeft.runs.history import read_history, read_lines

pytestmark = pytest.mark.slow
STEPS = 500  # so many that a run does not end before it is stopped


def _start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsepeft_cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "SPARSEPEFT_DATA"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _wait_for(process: subprocess.Popen, is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_stopped_kept_and_resumed(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    unfinished = folder / UNFINISHED
    history = unfinished / "history.jsonl"
    command = ("train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", STEPS)
    command += ("--batch-size", 4)  # many steps, to be stopped between them, in a short time
    steps = 0
    for number, code, word in ((signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")):
        process = _start(*command)
        if number == signal.SIGINT:  # the folder is held long before the first step
            _wait_for(process, unfinished.exists)
            process.send_signal(signal.SIGSTOP)  # or it might end before the other has begun
            second = sparsepeft(*command)
            process.send_signal(signal.SIGCONT)
            assert second.returncode == 2
            assert "Another process is writing to" in second.stderr
        _wait_for(process, lambda after=steps: any(line["step"] > after for line in read_lines(history)))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, "")
        found = (unfinished / "checkpoints").glob("checkpoint-*[0-9]")  # the last, and maybe the best
        stopped = max(int(checkpoint.name.rpartition("-")[2]) for checkpoint in found)
        assert steps < stopped < STEPS
        assert err.splitlines()[-1].startswith(
            f"{word} at step {stopped} of {STEPS:,}; the checkpoint of step {stopped} is"
        )
        assert (f"going on from step {steps}" in err) == (steps > 0)
        steps = stopped

    finished = ran(*command, "--json")
    assert json.loads(finished.stdout)["steps"] == STEPS
    for part in (
        "topics: spartan on",
        "rows: training 270, selection 30, validation 60, test 120",
        f"step {STEPS}/{STEPS}",
        "ETA",
    ):
        assert part in finished.stderr
    lines = [(line["step"], "loss" in line) for line in read_history(folder)]
    assert lines == sorted(set(lines), key=lambda line: (line[0], not line[1]))
    assert not (folder / UNFINISHED).exists()
