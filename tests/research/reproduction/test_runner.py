"""A matrix that is really run: it resumes, outlives SIGKILL and failing runs, and is shared between processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.matrices import Recorder, hand_made_result, names, small_matrix

from sparsepeft.errors import Diverged, UserError
from sparsepeft.runs.files import RESULTS
from sparsepeft.storage import storage_report
from sparsepeft_research.reproduction import GridSearch, plan, plan_of, reproduce, run_all
from sparsepeft_research.reproduction.runner import claim

pytestmark = pytest.mark.slow


def test_what_is_done_is_not_done_again(tiny_backbone: Path, tmp_path: Path) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, methods=["head"], seeds=[1])
    first, second = Recorder(), Recorder()
    outcome = reproduce("table2", matrix, watcher=first)
    assert not outcome.failures
    assert first.here == names(matrix.runs())
    before = {run.name: run.result_file.read_bytes() for run in matrix.runs()}
    assert reproduce("table2", matrix, watcher=second).table == outcome.table
    assert (second.here, second.there) == ([], names(matrix.runs()))
    assert {run.name: run.result_file.read_bytes() for run in matrix.runs()} == before
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]

    more = small_matrix(tiny_backbone, tmp_path, seeds=[1, 2], methods=["head"])
    third = Recorder()
    reproduce("table2", more, watcher=third)
    assert third.here == ["topics-head-2"]


def test_planning_runs_nothing(tiny_backbone: Path, tmp_path: Path) -> None:
    planned = plan_of(small_matrix(tiny_backbone, tmp_path / "out"))
    assert [p.state for p in planned] == ["pending"] * 4
    assert not (tmp_path / "out").exists()


def test_the_table_has_the_bytes_and_parameters_that_are_on_disk(tiny_backbone: Path, tmp_path: Path) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, seeds=[1], methods=["spartan", "full"])
    outcome = reproduce("table2", matrix, keep_weights=True)
    for row in outcome.table.rows:
        folder = tmp_path / "work" / f"topics-{row.method}-1"
        assert row.saved_bytes["topics"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (counted,) = storage_report(str(tiny_backbone), 1, num_labels=5, methods=["spartan"]).methods
    spartan = next(row for row in outcome.table.rows if row.method == "spartan")
    assert spartan.parameters["topics"] == counted.parameters_per_task + counted.head_parameters_per_task[0]


def test_a_failing_run_is_recorded_and_the_others_go_on(tiny_backbone: Path, tmp_path: Path) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, seeds=[1])
    blocked = tmp_path / "work" / "topics-spartan-1"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder belongs")
    recorder = Recorder()
    outcome = reproduce("table2", matrix, watcher=recorder)
    assert list(outcome.failures) == list(recorder.failures) == ["topics-spartan-1"]
    assert recorder.here == ["topics-head-1"]
    error = json.loads((tmp_path / "topics-spartan-1.error.json").read_text())
    assert error["type"] == "UserError"
    assert "is a file" in error["message"]
    assert "Traceback" in error["traceback"]
    assert error["environment"]["python"]
    assert [(p.run.name, p.state) for p in plan(matrix.runs())] == [
        ("topics-spartan-1", "failed"),
        ("topics-head-1", "done"),
    ]
    blocked.unlink()
    again = Recorder()
    assert not reproduce("table2", matrix, watcher=again).failures
    assert again.here == ["topics-spartan-1"]
    assert not (tmp_path / "topics-spartan-1.error.json").exists()


def test_a_diverging_run_is_named_as_such(tiny_backbone: Path, tmp_path: Path) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, seeds=[1], methods=["full"], values={"learning_rate": 1e35})
    (error,) = reproduce("table2", matrix).failures.values()
    assert error["type"] == Diverged.__name__


def test_damaged_and_foreign_results_are_named_done_again_and_kept(
    tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, seeds=[1])
    (tmp_path / "topics-head-1.json").write_text('{"score": 0.9')
    foreign = small_matrix(tiny_backbone, tmp_path, seeds=[1], methods=["spartan"], num_examples=11).runs()[0]
    hand_made_result(foreign, 0.9)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, logger="sparsepeft"):
        outcome = reproduce("table2", matrix, watcher=recorder)
    assert sorted(recorder.here) == ["topics-head-1", "topics-spartan-1"]
    said = [record.getMessage() for record in caplog.records if "is not counted" in record.getMessage()]
    assert any("topics-head-1.json" in line and "damaged" in line for line in said)
    assert any("topics-spartan-1.json" in line and "few_shot" in line for line in said)
    assert (tmp_path / "topics-head-1.json.stale-1").read_text() == '{"score": 0.9'
    assert all(row.average is not None and row.average.mean < 90 for row in outcome.table.rows)


def test_a_run_that_ended_just_before_its_result_was_written_is_not_trained_again(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, seeds=[1], methods=["head"])
    reproduce("table2", matrix, keep_weights=True)
    (run,) = matrix.runs()
    before = json.loads(run.result_file.read_text())
    weights = run.work_folder / "adapter_model.safetensors"
    stamp = weights.stat().st_mtime_ns
    run.result_file.unlink()
    reproduce("table2", matrix, keep_weights=True)
    assert weights.stat().st_mtime_ns == stamp
    after = json.loads(run.result_file.read_text())
    assert after["metrics"] == before["metrics"]
    assert after["reproduction"]["resumed"]
    # Damaged: trained again.
    run.result_file.unlink()
    (run.work_folder / RESULTS).write_text("{")
    reproduce("table2", matrix, keep_weights=True)
    assert weights.stat().st_mtime_ns != stamp
    assert not json.loads(run.result_file.read_text())["reproduction"]["resumed"]
    # Other values: what stands in the work folder is another run's.
    other = small_matrix(tiny_backbone, tmp_path, seeds=[1], methods=["head"], num_examples=11)
    assert reproduce("table2", other).table.rows
    assert json.loads(run.result_file.read_text())["num_train"] == 11


def test_a_claimed_run_is_left_to_who_has_it(tiny_backbone: Path, tmp_path: Path) -> None:
    runs = small_matrix(tiny_backbone, tmp_path, seeds=[1]).runs()
    runs[0].lock_file.parent.mkdir(parents=True)
    with claim(runs[0]) as claimed:
        assert claimed
        with claim(runs[0]) as again:
            assert not again
        assert [p.state for p in plan(runs)] == ["running", "pending"]
    assert [p.state for p in plan(runs)] == ["pending", "pending"]


def test_an_unusable_folder_is_said(tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    matrix = small_matrix(tiny_backbone, tmp_path / "file", seeds=[1])
    with pytest.raises(UserError, match="`output_dir`"):
        run_all(matrix.runs())


def test_the_grid_chooses_on_held_out_training_data_and_trains_the_choice(tiny_backbone: Path, tmp_path: Path) -> None:
    matrix = small_matrix(tiny_backbone, tmp_path, methods=["full"], values={"max_steps": 2})
    search = GridSearch(matrix)
    for run, score in zip(search.points, (0.2, 0.4, 0.3), strict=True):
        assert (run.config.score_on, run.config.seed) == ("selection", 1)
        hand_made_result(run, score)
    search.points[0].result_file.unlink()
    assert search.chosen() == {("topics", "full"): None}
    assert search.runs() == []
    table = reproduce("table2", matrix, grid=True, run=False).table
    assert "Not decided by the grid search yet: topics full." in table.notes

    recorder = Recorder()
    outcome = reproduce("table2", matrix, grid=True, watcher=recorder)
    assert recorder.there == names(search.points[1:])
    assert recorder.here == ["topics-full-1-lr2e-5", "topics-full-1", "topics-full-2"]
    point = json.loads(search.points[0].result_file.read_text())
    assert list(point["metrics"]) == ["selection"]  # the validation set was not touched
    best = max((point["score"], 2e-5), (0.4, 1e-4))[1]
    assert outcome.table.chosen["topics full"]["learning_rate"] == best
    final = json.loads((tmp_path / "topics-full-1.json").read_text())
    assert (final["config"]["learning_rate"], final["config"]["score_on"]) == (best, "validation")
    assert "test" in final["metrics"]


def start(folder: Path, backbone: Path, max_steps: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "sparsepeft_cli", "reproduce", "table2", "--tasks", "topics"),
        *("--methods", "head,spartan", "--seeds", "1,2", "--few-shot", "10", "--max-steps", str(max_steps)),
        *("--model", str(backbone), "--output-dir", str(folder), "--json"),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    variables.pop("SPARSEPEFT_DATA", None)  # else the command's config would have a folder that the test's has not
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.cluster
def test_killed_halfway_it_ends_with_the_whole_table_in_two_processes(tiny_backbone: Path, tmp_path: Path) -> None:
    steps = 60
    process = start(tmp_path, tiny_backbone, steps)
    wait_for(process, tmp_path, "work/topics-spartan-1/unfinished/checkpoints/checkpoint-*/trainer_state.json")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert list(before) == ["topics-head-1.json"]

    matrix = small_matrix(tiny_backbone, tmp_path, methods=["head", "spartan"], values={"max_steps": steps})
    every = names(matrix.runs())
    process, recorder = start(tmp_path, tiny_backbone, steps), Recorder()
    table = reproduce("table2", matrix, watcher=recorder).table
    out, err = process.communicate(timeout=400)
    theirs = [name for name in every if f"{name} " in err and name not in recorder.here and name != every[0]]
    assert sorted(["topics-head-1", *recorder.here, *theirs]) == sorted(every)  # each run once
    assert (tmp_path / "topics-head-1.json").read_bytes() == before["topics-head-1.json"]
    resumed: dict[str, Any] = json.loads((tmp_path / "topics-spartan-1.json").read_text())
    assert resumed["reproduction"]["resumed"]
    assert resumed["steps"] == steps
    assert not [note for note in table.notes if "Missing" in note]
    assert json.loads(out) == json.loads(json.dumps(table.to_dict()))
    assert {score.n for row in table.rows for score in row.scores.values()} == {2}
    assert not list(tmp_path.glob("*.stale-*"))
    assert not list(tmp_path.glob("work/*/" + RESULTS))
