"""Paths in configs are absolute, so that a run can be used from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepeft.folders import write_json
from sparsepeft.paths import with_absolute_paths, without_folders
from sparsepeft.runs.files import RUN, describe_run, read_run
from sparsepeft.tasks import task_spec
from sparsepeft.training import RunConfig


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "minilm").mkdir()


def test_paths_are_made_absolute_and_names_are_not(tmp_path: Path) -> None:
    config = RunConfig("custom", "out", train_file="a/../mine.csv", data_dir="~/data", model="home/model")
    assert config.train_file == str(tmp_path / "mine.csv")
    assert config.data_dir == str(tmp_path / "home" / "data")
    assert config.model == str(tmp_path / "home" / "model")
    for name in (None, "minilm", "FacebookAI/roberta-base"):  # the folder of that name is not the default backbone
        assert with_absolute_paths({"model": name}) == {"model": name}
    texts = RunConfig("lm", "out", model="home/model", text="a.txt", validation_text=("b.txt",))  # type: ignore[arg-type]
    assert (texts.text, texts.validation_text) == ((str(tmp_path / "a.txt"),), (str(tmp_path / "b.txt"),))
    assert without_folders(config.to_dict())["train_file"] == "mine.csv"


def test_a_link_keeps_its_name_which_says_the_format(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "train.csv").symlink_to("blob")
    assert RunConfig("custom", "out", train_file="train.csv").train_file == str(tmp_path / "train.csv")


def test_runs_with_relative_paths_are_read_from_where_they_were_made(tmp_path: Path) -> None:
    config = RunConfig("custom", "out", train_file="mine.csv")
    run = describe_run(config) | {"task": vars(task_spec("topics"))}
    write_json(tmp_path / "out" / RUN, run | {"config": run["config"] | {"train_file": "mine.csv"}})
    assert read_run(tmp_path / "out")["config"] == config.to_dict()  # as it is compared when it is resumed
