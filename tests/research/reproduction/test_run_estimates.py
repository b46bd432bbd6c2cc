"""Estimates from measured steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.matrices import hand_made_run, small_matrix

from sparsepeft_research.reproduction import plan_of
from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.planning import MEASURED, StepTimes, _Measured, plan


@pytest.mark.slow
def test_steps_are_measured_and_nothing_is_left(tiny_backbone: Path, tmp_path: Path) -> None:
    told: list[str] = []
    matrix = small_matrix(tiny_backbone, tmp_path / "out", seeds=[1, 2])
    planned = plan_of(matrix, measure=True, progress=told.append)
    assert {one.estimate for one in planned} == {MEASURED}
    assert all(one.seconds is not None and one.seconds > 0 for one in planned)
    assert len(told) == len({one.run.config.method for one in planned})  # one task, so one length
    assert list(tmp_path.iterdir()) == []


def test_between_two_lengths_steps_grow_linearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hand_made_run(tmp_path, "rte", "head", 1, protocol="few-shot", max_steps=100)
    runs = [_with_chars(run, chars) for chars in (300.0, 100.0, 200.0)]
    times = StepTimes(runs)
    monkeypatch.setattr(times, "_measure", lambda one: _Measured(one.facts.mean_chars, 5.0, one.facts.mean_chars / 1e3))
    assert [one.seconds for one in plan(runs, times)] == pytest.approx([35.0, 15.0, 25.0])
    scored = dataclasses.replace(run, facts=dataclasses.replace(run.facts, mean_chars=200.0, num_reported=4800))
    assert times.seconds(scored) == pytest.approx(25.0 + 0.2 * 4800 / run.config.recipe_values().batch_size / 3)


def test_a_model_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    run = hand_made_run(tmp_path, "rte", "head", 1, model="nobody/nothing")
    assert plan([run], StepTimes([run]))[0].seconds is None


def _with_chars(run: Run, chars: float) -> Run:
    return dataclasses.replace(run, facts=dataclasses.replace(run.facts, mean_chars=chars))
