"""The space of a sweep: what its file may hold, the trials drawn from it, and each mistake in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny import topics_rows, write_jsonl

from sparsepeft.errors import UserError
from sparsepeft.sweeps import SweepOptions, plan_sweep, read_space
from sparsepeft.sweeps.files import DONE, FAILED, LEFT, write_failed
from sparsepeft.training import train


def space_file(folder: Path, content: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_grids_are_combined_and_the_rest_is_drawn(tmp_path: Path) -> None:
    space = read_space(
        space_file(
            tmp_path,
            """
            task: {grid: [topics, rte]}
            learning-rate: {loguniform: [1e-4, 1e-2]}
            weight_decay: {uniform: [0, 0.1]}
            warmup_ratio: 1e-1
            settings:
              num_parents: {lograndint: [4, 65]}
              top_k: {choice: [1, 2]}
            seed: {grid: [1, 2]}
            """,
        ),
        data_dir=tmp_path,
    )
    trials = space.trials(tmp_path / "out", num_samples=3, seed=5)
    assert [(trial.group, trial.values["seed"]) for trial in trials[::3]] == [
        *(("topics", 1), ("topics", 2), ("rte", 1), ("rte", 2))
    ]
    assert len({trial.name for trial in trials}) == len(trials) == 12
    for trial in trials:
        config, values = trial.config, trial.values
        assert (config.task, config.seed, config.warmup_ratio) == (trial.group, values["seed"], 0.1)
        assert config.settings == {"num_parents": values["num_parents"], "top_k": values["top_k"]}
        assert 1e-4 <= config.learning_rate <= 1e-2  # type: ignore[operator]
        assert 4 <= values["num_parents"] <= 64
        assert (config.score_on, Path(config.output_dir)) == ("selection", tmp_path / "out" / trial.name)
        assert trial.name == ",".join([trial.group, *(f"{k}={v}" for k, v in values.items() if k != "task")])
        assert config.data_dir == str(tmp_path)
    by_seed = [[{**t.values, "seed": 0} for t in trials if t.values["seed"] == seed] for seed in (1, 2)]
    assert by_seed[0] == by_seed[1]  # so that scores are averaged over seeds
    again = {trial.name for trial in space.trials(tmp_path / "out", num_samples=5, seed=5)}
    assert {trial.name for trial in trials} < again  # a sweep that grows keeps its trials
    assert not again & {trial.name for trial in space.trials(tmp_path / "out", num_samples=5, seed=6)}


@pytest.mark.slow
def test_trials_on_data_that_changed_are_none_of_the_sweep(tiny_backbone: Path, tmp_path: Path) -> None:
    file, out, options = tmp_path / "mine.jsonl", tmp_path / "out", SweepOptions()
    write_jsonl(file, topics_rows("train"))
    values = {"train_file": str(file), "model": str(tiny_backbone), "method": "head", "max_steps": 2}
    space = read_space(space_file(tmp_path, values | {"learning_rate": {"grid": [1e-3, 1e-4]}}))
    first, second = (standing.trial for standing in plan_sweep(space, out, options))
    out.mkdir()
    (out / "sweep.json").write_text("{}")
    train(first.config)
    write_failed(second, "it failed")
    assert [standing.state for standing in plan_sweep(space, out, options)] == [DONE, FAILED]
    write_jsonl(file, topics_rows("train")[:60])
    with pytest.raises(UserError, match=r"mine\.jsonl \(its content\).*`overwrite`"):
        plan_sweep(space, out, options)
    assert [standing.state for standing in plan_sweep(space, out, options, overwrite=True)] == [LEFT, LEFT]


def test_equal_draws_are_one_trial(tmp_path: Path) -> None:
    space = read_space(space_file(tmp_path, {"task": "topics", "batch_size": {"choice": [4, 8]}}))
    assert {trial.name for trial in space.trials(tmp_path, num_samples=20)} == {"batch_size=4", "batch_size=8"}
    (only,) = read_space(space_file(tmp_path, {"task": "topics"})).trials(tmp_path, num_samples=3)
    assert (only.name, only.values) == ("run", {})


def test_names_are_safe_and_different(tmp_path: Path) -> None:
    files = [str(tmp_path / folder / "mine.csv") for folder in ("a", "b")]
    layers = {"grid": [[0, 1], [1]]}
    content = {"train_file": {"grid": files}, "settings": {"layers_to_transform": layers}, "method": "lora"}
    trials = read_space(space_file(tmp_path, content)).trials(tmp_path)
    assert len({trial.name for trial in trials}) == 4
    assert {trial.group for trial in trials} == {"a/mine", "b/mine"}
    assert all(set(trial.name).isdisjoint("/[] ") for trial in trials)
    assert {trial.config.train_file for trial in trials} == set(files)


MISTAKES = {
    "nothing: 3": "config key 'nothing' is unknown",
    "task: lm": "has the task lm, which has no scores to choose by",
    "task: {grid: [topics, lm]}": "has the task lm",
    "output_dir: x": "each trial gets a folder of its own",
    "score_on: validation": "trials are chosen by a tenth of the training data",
    "learning_rate: {grid: []}": "learning_rate has grid: .*takes a list of values",
    "learning_rate: {choice: 3}": "takes a list of values",
    "learning_rate: {logunifrom: [1, 2]}": "search 'logunifrom' is unknown.*did you mean 'loguniform'",
    "learning_rate: {uniform: [1, x]}": r"takes two numbers, \[low, high\]",
    "learning_rate: {uniform: [2, 1]}": "with low < high",
    "learning_rate: {loguniform: [0, 1]}": "with 0 < low < high",
    "batch_size: {randint: [1, 2.5]}": "takes two whole numbers",
    "batch_size: {randint: [1]}": "takes two whole numbers",
    "batch_size: {grid: [8, 0]}": "The trial batch_size=0 cannot be run: `batch_size=0` was given",
    "settings: {top_k: {grid: [0.5, 1.5]}, batch_size: 1.5}": "The trial top_k=0.5 cannot be run: `batch_size=1.5`",
    "method: {grid: [spartan, loro]}": "The trial method=loro cannot be run: .*did you mean 'lora'",
    "[1, 2]": "holds list, but a config file is a mapping",
    "{": "is not valid YAML or JSON",
}


@pytest.mark.parametrize(("content", "words"), MISTAKES.items(), ids=[*MISTAKES])
def test_mistakes_are_said(content: str, words: str, tmp_path: Path) -> None:
    task = "" if content.startswith(("task", "[", "{")) else "task: topics\n"
    file = space_file(tmp_path, task + content)
    with pytest.raises(UserError, match=words):
        read_space(file).trials(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; pass an existing YAML or JSON file as `space`"):
        read_space(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="No `task` was given"):
        read_space(space_file(tmp_path, {"epochs": 1})).trials(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", 0), ("grace_period", 1.5), ("reduction_factor", 1), ("max_concurrent", 0), ("max_failures", -1)],
)
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"`{name}={value}` was given, but it must be"):
        SweepOptions(**{name: value})
