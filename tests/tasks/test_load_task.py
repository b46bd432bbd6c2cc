"""Names, aliases, and where data comes from."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest

from sparsepeft.tasks import TaskError, load_task, task_names, task_spec
from sparsepeft.tasks.spec import GLUE_TASKS


def test_names_and_other_spellings() -> None:
    assert task_names() == [*GLUE_TASKS, "bbc-news", "topics", "wnut17", "custom"]
    others = {
        "SST-2": "sst2",
        "sst_2": "sst2",
        "STS-B": "stsb",
        "CoLA": "cola",
        "bbc": "bbc-news",
        "BBC_News": "bbc-news",
    }
    assert {other: task_spec(other).name for other in others} == others
    for name, near in (("colla", "cola"), ("sst3", "sst2"), ("topic", "topics")):
        with pytest.raises(TaskError, match=rf"unknown task '{name}': did you mean '{near}'\? .*cola, .*custom"):
            load_task(name)
    with pytest.raises(TaskError, match=r"unknown task 'zzzzzz': the tasks are cola, "):
        load_task("zzzzzz")
    with pytest.raises(TaskError, match="no fixed description"):
        task_spec("custom")


def test_topics_come_with_the_package() -> None:
    data = load_task("topics")
    assert data.source == "topics (built in)"
    assert data.spec.label_names == ("business", "health", "science", "sport", "travel")
    assert data.test is not None
    for part in (data.train, data.validation, data.test):
        assert part.column_names == ["text", "label"]
        assert sorted(Counter(part["label"][:])) == [0, 1, 2, 3, 4]
    assert set(data.fingerprints) == {"train.jsonl", "validation.jsonl", "test.jsonl"}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cola", {"train_file": "x.csv", "label_column": "y"}, r"`train_file`, `label_column` came with the task"),
        ("custom", {}, r"the task 'custom' reads your own files; pass `train_file`"),
        ("custom", {"train_file": "x.csv", "source": "hub"}, r"reads your own files"),
        ("topics", {"source": "hub"}, r"comes with the package and is not on the hub"),
        ("rte", {"source": "web"}, r"`source=web` was given; expected one of auto, files, hub"),
        ("rte", {"source": "files"}, r"no data folder; pass `data_dir` or set SPARSEPEFT_DATA"),
        ("bbc-news", {"source": "files"}, r"no data folder; pass"),
    ],
)
def test_arguments_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, kwargs: dict[str, str], message: str
) -> None:
    monkeypatch.delenv("SPARSEPEFT_DATA", raising=False)
    with pytest.raises(TaskError, match=message):
        load_task(name, **kwargs)  # type: ignore[arg-type]


def test_the_variable_is_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wnli").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "wnli" / name).write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n")
    monkeypatch.setenv("SPARSEPEFT_DATA", str(tmp_path))
    assert len(load_task("wnli").train) == 1
    with pytest.raises(TaskError, match="elsewhere does not exist"):
        load_task("wnli", data_dir=tmp_path / "elsewhere")


def test_a_spec_can_be_pickled() -> None:
    spec = task_spec("mnli")
    assert pickle.loads(pickle.dumps(spec)) == spec
