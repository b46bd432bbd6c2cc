"""A matrix on a Ray cluster: the same table, and a run whose worker is killed goes on in another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, sparsepeft
from tests.matrices import Recorder, names, small_matrix
from tests.workers import killed_worker

from sparsepeft.errors import UserError
from sparsepeft_research.reproduction import Cluster, reproduce

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_the_table_is_that_of_runs_one_after_the_other(ray_cluster: str, tiny_backbone: Path, tmp_path: Path) -> None:
    matrices = [
        small_matrix(tiny_backbone, tmp_path / place, seeds=[1], values={"max_steps": 200})
        for place in ("here", "there")
    ]
    here = reproduce("table2", matrices[0])
    recorder = Recorder()
    with killed_worker(tmp_path / "there" / "work" / "topics-spartan-1"):
        there = reproduce("table2", matrices[1], watcher=recorder, cluster=Cluster())
    assert not there.failures
    assert sorted(recorder.here) == sorted(names(matrices[1].runs()))  # each once
    assert [(row.method, row.scores, row.saved_bytes) for row in there.table.rows] == [
        (row.method, row.scores, row.saved_bytes) for row in here.table.rows
    ]
    killed = json.loads((tmp_path / "there" / "topics-spartan-1.json").read_text())
    assert (killed["reproduction"]["resumed"], killed["steps"]) == (True, 200)
    again = Recorder()
    assert reproduce("table2", matrices[1], watcher=again, cluster=Cluster()).table == there.table
    assert (again.here, len(again.there)) == ([], 2)


def test_the_command_and_a_run_that_fails(ray_cluster: str, tiny_backbone: Path, tmp_path: Path) -> None:
    command = [
        *("reproduce", "table2", "--tasks", "topics", "--methods", "head", "--seeds", "1,2", "--few-shot", 10),
        *("--max-steps", 2, "--model", tiny_backbone, "--output-dir", tmp_path, "--ray"),
    ]
    blocked = tmp_path / "work" / "topics-head-1"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder belongs")
    done = sparsepeft(*command)
    assert done.returncode == 1
    assert "topics-head-1" in done.stderr.splitlines()[-1]
    assert "is a file" in json.loads((tmp_path / "topics-head-1.error.json").read_text())["message"]
    blocked.unlink()
    assert "topics-head-1 " in ran(*command, "--cpus-per-run", 1).stderr
    done = sparsepeft(*command[:-1], "--cpus-per-run", 1)
    assert "--cpus-per-run was given without --ray; pass --ray as well." in done.stderr


def test_numbers_out_of_range() -> None:
    with pytest.raises(UserError, match=r"`cpus_per_run=0` was given"):
        Cluster(cpus_per_run=0)
    with pytest.raises(UserError, match=r"`gpus_per_run=-1` was given"):
        Cluster(gpus_per_run=-1)
