"""Which runs a matrix has, in which order, how long they may take, and what is refused before any of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.matrices import hand_made_result, hand_made_run, names, small_matrix

from sparsepeft.errors import UserError
from sparsepeft_research.reproduction import Run, plan, plan_of
from sparsepeft_research.reproduction.planning import MEASURED, StepTimes, _Measured
from sparsepeft_research.reproduction.protocols import GRID_LEARNING_RATES, few_shot, full_data, grid_search


def test_seed_by_seed_and_the_short_first(tiny_backbone: Path, tmp_path: Path) -> None:
    runs = small_matrix(tiny_backbone, tmp_path, methods=["full", "head"], seeds=[7, 3]).runs()
    assert names(runs) == ["topics-full-7", "topics-head-7", "topics-full-3", "topics-head-3"]
    assert {run.steps for run in runs} == {4}
    short = hand_made_run(tmp_path, "rte", "full", 1, max_epochs=1)
    long = hand_made_run(tmp_path, "rte", "full", 1)
    assert short.steps == round(0.9 * 1000 / 16)
    assert long.work == pytest.approx(20 * short.work, rel=0.02)


def test_a_method_s_values_go_before_those_of_all(tiny_backbone: Path, tmp_path: Path) -> None:
    shared = small_matrix(tiny_backbone, tmp_path).values | {"learning_rate": 1e-3, "settings": {"weight_decay": 0.1}}
    own = {"spartan": {"learning_rate": 2e-3, "settings": {"top_k": 2}}}
    matrix = small_matrix(
        tiny_backbone, tmp_path, methods=["spartan", "head"], seeds=[1], values=shared, method_values=own
    )
    found = {run.config.method: (run.config.learning_rate, run.config.settings) for run in matrix.runs()}
    assert found == {
        "spartan": (2e-3, {"weight_decay": 0.1, "top_k": 2}),
        "head": (1e-3, {"weight_decay": 0.1}),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["topics", "tpics"]}, ["tpics", "did you mean 'topics'"]),
        ({"methods": ["spartan", "spartn"]}, ["spartn", "did you mean 'spartan'"]),
        ({"seeds": []}, ["`seeds`"]),
        ({"protocol": "fewshot"}, ["did you mean 'few-shot'"]),
        ({"method_values": {"lora": {"learning_rate": 1}}}, ["lora", "add the method"]),
        ({"method_values": {"spartan": {"max_lenght": 3}}, "methods": ["spartan"]}, ["did you mean 'max_length'"]),
        ({"max_epochs": 3}, ["max_epochs", "max_steps"]),
        ({"values": {"seed": 3}}, ["seed", "the matrix decides"]),
        ({"values": {"max_lenght": 3}}, ["did you mean 'max_length'"]),
        ({"values": {"settings": {"num_parent": 3}}, "methods": ["spartan"]}, ["did you mean 'num_parents'"]),
        ({"values": {"model": "/nowhere/at/all"}}, ["/nowhere/at/all"]),
        ({"values": {"max_train_samples": 5}}, ["max_train_samples", "few-shot"]),
        ({"tasks": ["rte"], "values": {"data_dir": "/nowhere"}}, ["/nowhere", "does not exist"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_run(
    tiny_backbone: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        small_matrix(tiny_backbone, tmp_path / "out", **changes).runs()
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_full_data_takes_the_papers_epochs_up_to_the_cap() -> None:
    assert full_data("cola", "full", 1, "o").epochs == 20
    assert full_data("cola", "full", 1, "o", max_epochs=5).epochs == 5
    assert full_data("sst2", "full", 1, "o", max_epochs=5).epochs == 3
    with pytest.raises(UserError, match="leave it out"):
        full_data("cola", "full", 1, "o", few_shot=3)
    with pytest.raises(UserError, match="max_epochs=0"):
        full_data("cola", "full", 1, "o", max_epochs=0)
    assert few_shot("cola", "full", 1, "o").few_shot == 200


def test_the_grid_is_the_papers() -> None:
    points = grid_search("cola", "spartan", 1, "o")
    assert len(points) == 3 * 2 * 2
    assert {point.score_on for point in points.values()} == {"selection"}
    assert {point.learning_rate for point in points.values()} == set(GRID_LEARNING_RATES)
    assert {point.settings["num_parents"] for point in points.values()} == {12, 16}
    assert len({point.output_dir for point in points.values()}) == len(points)
    assert len(grid_search("cola", "houlsby", 1, "o", max_epochs=2)) == 3 * 2
    assert list(grid_search("cola", "full", 1, "o", num_examples=20)) == ["lr2e-5", "lr1e-4", "lr1e-3"]
    assert {point.epochs for point in grid_search("cola", "full", 1, "o").values()} == {3, 20}
    with pytest.raises(UserError, match="num_parents came with a grid search"):
        grid_search("cola", "spartan", 1, "o", settings={"num_parents": 8})


def test_times_are_estimated_from_what_has_run(tmp_path: Path) -> None:
    def run(task: str, method: str, seed: int) -> Any:
        return hand_made_run(tmp_path, task, method, seed, max_epochs=2)

    runs = [run("rte", "full", 1), run("rte", "full", 2), run("mrpc", "full", 1), run("mrpc", "head", 1)]
    assert [planned.seconds for planned in plan(runs)] == [None] * 4
    hand_made_result(runs[0], 0.5)
    done, same, other_task, other_method = plan(runs)
    assert (done.state, done.seconds) == ("done", 40)
    assert (same.state, same.seconds) == ("pending", 40)
    assert other_task.seconds == pytest.approx(40)  # as many characters
    assert other_method.seconds == pytest.approx(40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rte-full-1.json"]


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
