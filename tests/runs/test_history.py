"""The history of a run: its lines, its figure, and trackers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.tiny import run_config
from transformers.integrations import integration_utils

from sparsepeft.errors import UserError
from sparsepeft.runs.config_values import read_trackers
from sparsepeft.runs.files import LOGS
from sparsepeft.runs.history import by_step, plot_history, read_history, score_names
from sparsepeft.training import train
from sparsepeft.training.callbacks import Recorder, make_reporters


def _record(path: Path, begin: int, *logs: tuple[int, dict[str, Any]]) -> None:
    recorder = Recorder(path)
    recorder.on_train_begin(None, SimpleNamespace(global_step=begin, is_world_process_zero=True), None)
    for step, values in logs:
        recorder.on_log(
            None, SimpleNamespace(global_step=step, epoch=step / 8, is_world_process_zero=True), None, values
        )


def test_lines_go_on_after_a_checkpoint_and_bear_a_cut_end(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    train = {"loss": 2.0, "grad_norm": float("inf"), "learning_rate": 0.1, "epoch": 0.5}
    scores = {"eval_loss": 1.5, "eval_accuracy": 0.5, "eval_score": 0.5, "eval_runtime": 3.0}
    _record(path, 0, (4, train), (4, scores), (8, train), (9, {"train_runtime": 1.0, "train_loss": 2.0}))
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_history(tmp_path)
    assert [line["step"] for line in read_history(tmp_path)] == [4, 4, 8]
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    _record(path, 6, (8, train | {"loss": 1.0}))
    assert [line["step"] for line in read_history(tmp_path)] == [4, 4, 8]
    first, last = by_step(read_history(tmp_path))
    assert (first["loss"], first["grad_norm"], first["eval_accuracy"], first["epoch"]) == (2.0, None, 0.5, 0.5)
    assert "eval_runtime" not in first
    assert last["loss"] == 1.0
    assert score_names(read_history(tmp_path)) == ["accuracy"]

    pytest.importorskip("matplotlib")
    for name in ("curves.png", "curves.svg"):
        plot_history(read_history(tmp_path), tmp_path / name, "a run")
        assert (tmp_path / name).stat().st_size > 1000
    assert "accuracy" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(UserError, match=r"end in \.png or \.svg"):
        plot_history(read_history(tmp_path), tmp_path / "curves")
    with pytest.raises(UserError, match="holds no history"):
        read_history(tmp_path / "none")


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_trackers(["tensorboard,wandb", "wandb"]) == ("tensorboard", "wandb")
    assert read_trackers(None) == read_trackers("none") == ()
    with pytest.raises(UserError, match=r"`report_to` 'tensorbord' is unknown.*did you mean 'tensorboard'"):
        make_reporters(["tensorbord"], tmp_path)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=r"`report_to=tensorboard` was given, but .* requires tensorboard"):
        make_reporters(["tensorboard"], tmp_path)


@pytest.mark.slow
def test_scalars_arrive_at_tensorboard(tiny_backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_config(tiny_backbone, tmp_path / "run", max_steps=4, eval_steps=2, report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / LOGS)).Reload()
    lines = read_history(tmp_path / "run")
    for tag, key in (("train/loss", "loss"), ("eval/accuracy", "eval_accuracy")):
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]
        assert found == [(line["step"], pytest.approx(line[key], abs=1e-4)) for line in lines if key in line]
