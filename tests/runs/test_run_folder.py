"""A run's folder, whenever the process that writes there is killed: the former run, what to go on from, or the new."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.killed import killed_at

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import UNFINISHED, settle
from sparsepeft.runs import folder as run_folder
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import CHECKPOINTS, RESULTS, RUN, describe_run, read_run
from sparsepeft.runs.folder import check_folder, open_run

STEPS = 3


def _run(folder: Path, seed: int) -> dict[str, Any]:
    config = RunConfig("lm", str(folder), model="llama", text=("text.txt",), seed=seed)
    return describe_run(config) | {"task": "lm", "bos_token_id": None}


def _train(folder: Path, seed: int, done: Path | None = None, stop: int | None = None) -> None:
    """Do to a folder what a training does, up to a step; ``done`` is told of each checkpoint that is complete."""
    run = _run(folder, seed)
    with open_run(folder, run, overwrite=True) as begin:
        work = begin(run)
        for step in range(_last_step(folder) + 1, STEPS + 1):
            checkpoint = work / CHECKPOINTS / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            for name in ("weights", "optimizer.pt", "trainer_state.json"):
                (checkpoint / name).write_text("whole")
            if done is not None:
                done.write_text(str(step))
            if step == stop:
                raise KeyboardInterrupt
        (work / "weights").mkdir()
        for name in ("weights/part", RESULTS):
            (work / name).write_text(json.dumps(seed))


def _last_step(folder: Path) -> int:
    states = (folder / UNFINISHED / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
    return max((int(state.parent.name.removeprefix("checkpoint-")) for state in states), default=0)


def _seed_of(folder: Path) -> int:
    """Of the run that answers in a folder, whose files must all be of that run."""
    seed: int = read_run(folder)["config"]["seed"]
    assert {json.loads((folder / name).read_text()) for name in ("weights/part", RESULTS)} == {seed}
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "former", "other", "same"])
def test_a_kill_at_any_operation_loses_nothing(tmp_path: Path, before: str) -> None:
    """``before``: a finished run, or beside it one with other values, or the very same, that was interrupted."""
    start, folder, done = tmp_path / "start", tmp_path / "run", tmp_path / "done"
    former, new = 1, 2
    if before != "nothing":
        _train(start, former)
    if before in ("other", "same"):
        with pytest.raises(KeyboardInterrupt):
            _train(start, new + (before == "other"), stop=2)
    number = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder) if before != "nothing" else folder.mkdir()
        done.write_text("2" if before == "same" else "0")
        if not killed_at(number, folder, lambda: _train(folder, new, done)):
            break
        settle(folder)
        if (folder / RUN).exists() and _seed_of(folder) == new:
            assert not (folder / UNFINISHED).exists()
        else:
            assert before == "nothing" or _seed_of(folder) == former
            last = int(done.read_text())
            if last:
                assert check_folder(folder, _run(folder, new), overwrite=True)
                states = (folder / UNFINISHED / CHECKPOINTS / f"checkpoint-{last}").iterdir()
                assert [state.read_text() for state in states] == 3 * ["whole"]
            _train(folder, new)
        assert _seed_of(folder) == new
        left = {path.name for path in folder.iterdir()} - {".lock"}
        assert left == {RUN, RESULTS, "weights", ".sparsepeft.json"}
        number += 1
    assert number > 30


def test_a_full_disk_at_the_very_end_keeps_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "finish", full)
    with pytest.raises(RunFailed, match=r"No space left on device.*; free space and resume"):
        _train(tmp_path, 1)
    assert _last_step(tmp_path) == STEPS
    monkeypatch.undo()
    _train(tmp_path, 1)
    assert _seed_of(tmp_path) == 1


@pytest.mark.parametrize("stop", [None, 2])
def test_a_truncated_run_file_is_named_and_nothing_replaced(tmp_path: Path, stop: int | None) -> None:
    with contextlib.nullcontext() if stop is None else pytest.raises(KeyboardInterrupt):
        _train(tmp_path, 1, stop=stop)
    file = tmp_path / (RUN if stop is None else f"{UNFINISHED}/{RUN}")
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with pytest.raises(UserError, match=rf"{file} is damaged .*; train again with `overwrite`"):
        read_run(tmp_path) if stop is None else check_folder(tmp_path, _run(tmp_path, 1), overwrite=False)
    file.write_bytes(content)
    assert _last_step(tmp_path) == (stop or 0)
    _train(tmp_path, 1)
    assert _seed_of(tmp_path) == 1
