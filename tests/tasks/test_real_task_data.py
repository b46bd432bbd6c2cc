"""The real data, where it is there: sizes, label balance, and parts that share nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sparsepeft.tasks import few_shot, load_task, split_train
from sparsepeft.tasks.splits import labels_of

# rows of train and dev; share of each class in train, as published or as counted in the files
SIZES = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "stsb": (5749, 1500),
    "wnli": (635, 71),
    "qnli": (9999, 5463),
    "qqp": (20000, 3497),
    "mnli": (8999, 1000),
}
POSITIVE = {"cola": 0.704, "sst2": 0.558, "mrpc": 0.674, "qqp": 0.372, "rte": 0.498, "wnli": 0.491, "qnli": 0.5}
PARTIAL = {"qnli": 1, "qqp": 2, "mnli": 2}  # number of notes


@pytest.mark.parametrize("name", SIZES)
def test_glue(data_dir: Path, name: str) -> None:
    data = load_task(name, data_dir=data_dir)
    assert (len(data.train), len(data.validation)) == SIZES[name]
    assert len(data.notes) == PARTIAL.get(name, 0)
    assert data.test is None
    labels = labels_of(data.train)
    if name == "stsb":
        assert min(labels) == 0.0
        assert max(labels) == 5.0
        assert sum(labels) / len(labels) == pytest.approx(2.70, abs=0.01)
        return
    shares = {label: count / len(labels) for label, count in Counter(labels).items()}
    if name == "mnli":
        assert shares == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, abs=0.02)
    else:
        assert shares[1] == pytest.approx(POSITIVE[name], abs=0.02)
    _, selection = split_train(data.train, data.spec)
    chosen = Counter(labels_of(selection))
    assert len(selection) == round(len(labels) / 10)
    assert {label: chosen[label] / len(selection) for label in chosen} == pytest.approx(shares, abs=0.5 / 10)
    assert len(few_shot(data.train, data.spec, 200, seed=1)) == 200


def test_known_rows(data_dir: Path) -> None:
    first = load_task("mrpc", data_dir=data_dir).train[0]
    assert first["text"].startswith('Amrozi accused his brother , whom he called " the witness "')
    assert first["label"] == 1
    assert load_task("rte", data_dir=data_dir).train[0]["label"] == 1
    assert load_task("stsb", data_dir=data_dir).validation[1]["label"] == pytest.approx(4.75)


def test_bbc_news(data_dir: Path) -> None:
    data = load_task("bbc-news", data_dir=data_dir)
    assert data.test is not None
    parts = [data.train, data.validation, data.test]
    texts = [set(part["text"][:]) for part in parts]
    assert [len(part) for part in parts] == [len(part) for part in texts] == [1700, 213, 212]
    assert len(set.union(*texts)) == 2125  # nothing is in two parts
    assert "100 duplicate texts of 2,225" in data.notes[1]
    train, test = Counter(labels_of(data.train)), Counter(labels_of(data.test))
    for label in range(5):
        assert test[label] / 212 == pytest.approx(train[label] / 1700, abs=0.01)
    again = load_task("bbc-news", data_dir=data_dir)
    assert again.train["text"][:] == data.train["text"][:]
