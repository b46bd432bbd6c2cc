"""Whole sweeps of a tiny model on a Ray cluster: equal to runs alone, stopped early, resumed, killed."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.test_cli import ran, sparsepeft
from tests.matrices import Recorder
from tests.tiny import topics_rows, write_jsonl
from tests.workers import killed_worker

from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED
from sparsepeft.runs.files import RESULTS
from sparsepeft.sweeps import Sweep, SweepOptions, plan_sweep, read_space, sweep
from sparsepeft.training import train

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STEPS = 40


class Watch(Recorder):
    """Remembers stopped trials, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[str] = []

    def stopped(self, run: str, step: int, max_steps: int, score: float, here: bool) -> None:
        self.stops.append(run)


def space_file(folder: Path, backbone: Path, **values: Any) -> Path:
    """A space on texts whose label is their first word: a run of few steps learns it."""
    path, mine = folder / "tiny.yaml", folder / "mine.jsonl"
    words = sorted({word for row in topics_rows("train") for word in row["text"].lower().split() if word.isalpha()})
    write_jsonl(mine, [{"text": f"{words[n % 2]} {words[n + 2]}", "label": "ab"[n % 2]} for n in range(160)])
    given = {"train_file": str(mine), "method": "full", "model": str(backbone), "max_steps": STEPS, "batch_size": 8}
    given |= values
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """A sweep in which two trials that learn nothing come after two that do, and one diverges."""
    folder = tmp_path_factory.mktemp("sweep")
    rates = {"grid": [1e-2, 3e-3, 1e-9, 2e-9, 1e35]}
    space = read_space(space_file(folder, tiny_backbone, learning_rate=rates))
    return folder, sweep(space, folder / "out", SweepOptions(grace_period=0.5, reduction_factor=2, max_concurrent=1))


def test_trials_are_ordinary_runs_and_the_best_is_first(swept: tuple[Path, Sweep], tmp_path: Path) -> None:
    _, found = swept
    best = found.trials[0]
    assert best.trial.values["learning_rate"] in (1e-2, 3e-3)
    assert list(found.best.values()) == [best]
    results = json.loads((Path(best.trial.config.output_dir) / RESULTS).read_text())
    alone = train(dataclasses.replace(best.trial.config, output_dir=str(tmp_path / "alone")))
    assert results["metrics"] == alone["metrics"]
    assert list(results["metrics"]) == ["selection"]  # no held-out part was looked at
    assert (best.score, best.steps) == (alone["score"], STEPS)
    names = {path.name for path in (tmp_path / "alone").iterdir() if not path.name.startswith(".")}
    assert {path.name for path in Path(best.trial.config.output_dir).iterdir()} >= names

    content = json.loads(found.file.read_text())
    assert content == json.loads(json.dumps(found.content))
    assert content["trials"][0]["state"] == "done"
    assert content["best"] == {"mine": best.trial.name}
    config = yaml.safe_load(found.configs["mine"].read_text())
    assert (config["learning_rate"], "score_on" in config) == (best.trial.values["learning_rate"], False)
    done = ran("train", "--config", found.configs["mine"], "--max-steps", 1, "--json")
    assert list(json.loads(done.stdout)["metrics"]) == ["validation"]


def test_trials_that_learn_nothing_are_stopped_and_one_diverges(swept: tuple[Path, Sweep]) -> None:
    _, found = swept
    states = {each.trial.values["learning_rate"]: each for each in found.trials}
    stopped = [each for each in found.trials if each.state == "stopped"]
    assert {each.trial.values["learning_rate"] for each in stopped} == {1e-9, 2e-9}
    assert not found.failed
    for each in stopped:
        folder = Path(each.trial.config.output_dir)
        note = json.loads(folder.with_name(f"{folder.name}.stopped.json").read_text())
        assert (note["steps"], note["max_steps"]) == (each.steps, STEPS) == (STEPS // 2, STEPS)
        assert not (folder / RESULTS).exists()
        assert not (folder / UNFINISHED / "checkpoints").exists()
    assert states[1e35].state == "diverged"
    assert "Diverged: " in str(states[1e35].error)


def test_the_same_sweep_runs_nothing_again_and_goes_on(swept: tuple[Path, Sweep], tiny_backbone: Path) -> None:
    folder, found = swept
    options = SweepOptions(grace_period=0.5, reduction_factor=2, max_concurrent=1)
    space = read_space(folder / "tiny.yaml")
    watch = Watch()
    again = sweep(space, folder / "out", options, watcher=watch)
    assert (watch.here, len(watch.there), len(watch.stops), len(watch.failures)) == ([], 2, 2, 1)
    assert again.trials == found.trials
    # A further trial is compared with what the others had: it is stopped, as they are not run.
    rates = {"grid": [1e-2, 3e-3, 1e-9, 2e-9, 1e35, 3e-9]}
    space = read_space(space_file(folder, tiny_backbone, learning_rate=rates))
    watch = Watch()
    more = sweep(space, folder / "out", options, watcher=watch)
    assert (watch.here, len(watch.there), len(watch.stops)) == ([], 2, 3)
    assert more.best["mine"].trial == found.best["mine"].trial
    with pytest.raises(UserError, match=r"The trial learning_rate=0.01 cannot be run: .*other values of max_steps"):
        plan_sweep(
            read_space(space_file(folder, tiny_backbone, learning_rate=rates, max_steps=5)), folder / "out", options
        )


def test_a_killed_worker_is_replaced_and_goes_on(ray_cluster: str, tiny_backbone: Path, tmp_path: Path) -> None:
    seeds = {"seed": {"grid": [1, 2]}, "method": "head", "max_steps": 300, "eval_steps": 30}
    space = read_space(space_file(tmp_path, tiny_backbone, **seeds))
    watch = Watch()
    with killed_worker(tmp_path / "out" / "seed=1"):
        found = sweep(space, tmp_path / "out", SweepOptions(asha=False), watcher=watch)
    assert sorted(watch.here) == ["seed=1", "seed=2"]  # each once
    assert [each.state for each in found.trials] == ["done", "done"]
    assert {each.steps for each in found.trials} == {300}
    (first,) = (each for each in found.trials if each.trial.name == "seed=1")
    alone = train(dataclasses.replace(first.trial.config, output_dir=str(tmp_path / "alone")))
    assert first.score == alone["score"]


def test_the_command_goes_on_after_an_interrupt_and_a_kill(
    ray_cluster: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    seeds = {"seed": {"grid": [1, 2]}, "method": "head", "max_steps": 300, "eval_steps": 30}
    file = space_file(tmp_path, tiny_backbone, **seeds)
    command = ["sweep", "--space", file, "--output-dir", tmp_path / "out", "--no-asha", "--address", ray_cluster]
    listed = ran(*command[:-2], "--dry-run")
    assert "2 trials" in listed.stdout
    assert not (tmp_path / "out").exists()
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsepeft_cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/*/unfinished/checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith("of 2 runs done; the same command goes on from there.")
    states = json.loads(ran(*command[:-2], "--dry-run", "--json").stdout)
    left = next(each["name"] for each in states if each["state"] == "left")
    with killed_worker(tmp_path / "out" / left):
        done = ran(*command[:-2], "--json")
    assert done.stdout.startswith("{"), done.stdout
    trials = {each["name"]: each for each in json.loads(done.stdout)["trials"]}
    assert {(each["state"], each["steps"]) for each in trials.values()} == {("done", 300)}
    (trial,) = (each for each in read_space(file).trials(tmp_path / "out") if each.name == left)
    alone = train(dataclasses.replace(trial.config, output_dir=str(tmp_path / "alone")))
    assert trials[left]["score"] == alone["score"]
    table = ran(*command[:-2])
    for words in ("seed", "score", "best", "300/300", "train the best:", "sweep.json"):
        assert words in table.stdout


def test_what_cannot_be_used_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    options = SweepOptions()
    cases = {
        "num_cows": {"settings": {"num_cows": 3}, "method": "spartan"},
        "abacus": {"device": "abacus"},
        "trials get no GPU; pass `gpus_per_trial`": {"device": "cuda"},
        "nobody/nothing": {"model": "nobody/nothing"},
        "none.csv": {"train_file": str(tmp_path / "none.csv")},
    }
    for words, values in cases.items():
        space = read_space(space_file(tmp_path, tiny_backbone, **values))
        with pytest.raises(UserError, match=words):
            plan_sweep(space, tmp_path / "out", options)
    with pytest.raises(UserError, match=r"is one for Ray's client.*pass HOST:6379"):
        sweep(read_space(space_file(tmp_path, tiny_backbone)), tmp_path / "out", address="ray://HOST:10001")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        plan_sweep(read_space(space_file(tmp_path, tiny_backbone)), tmp_path / "out", options)
    done = sparsepeft("sweep", "--space", tmp_path / "none.yaml")
    assert (done.returncode, "--space" in done.stderr) == (2, True)


def test_more_than_the_machine_has_is_refused(ray_cluster: str, tiny_backbone: Path, tmp_path: Path) -> None:
    file = space_file(tmp_path, tiny_backbone)
    done = sparsepeft("sweep", "--space", file, "--output-dir", tmp_path / "out", "--gpus-per-trial", 99)
    assert done.returncode == 2
    assert "--gpus-per-trial 99 was given, but this machine has " in done.stderr
