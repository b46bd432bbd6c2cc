"""Held-out tenths, few-shot draws and subsamples: sizes, proportions, determinism, odd label sets."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from datasets import Dataset

from sparsepeft.tasks import TaskError, TaskSpec, few_shot, split_train, subsample
from sparsepeft.tasks.spec import build_dataset
from sparsepeft.tasks.splits import pick

CLASSES = TaskSpec("toy", ("text",), ("a", "b", "c"), ("accuracy",), "accuracy", 1)
VALUES = TaskSpec("toy", ("text",), None, ("pearson",), "pearson", 1)


def toy(labels: list[float], spec: TaskSpec = CLASSES) -> Dataset:
    return build_dataset(spec, [(f"text {index}", label) for index, label in enumerate(labels)])


def counts(dataset: Dataset) -> dict[int, int]:
    return Counter(dataset["label"][:])


def test_split_train_is_a_stratified_partition() -> None:
    dataset = toy([0] * 70 + [1] * 20 + [2] * 10)
    train, selection = split_train(dataset, CLASSES, 0.1, seed=1)
    assert counts(selection) == {0: 7, 1: 2, 2: 1}
    assert sorted(train["text"][:] + selection["text"][:]) == sorted(dataset["text"][:])
    dataset = toy([0, 1] * 50)  # of which the seed alone decides
    first, again, other = (split_train(dataset, CLASSES, seed=seed)[1]["text"][:] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [
        ([0] * 99 + [1], (90, 10)),  # a class of one stays in training
        ([0, 0], (1, 1)),
        ([0, 1], (1, 1)),
        ([0, 1, 2], (2, 1)),
        ([0] * 15 + [1] * 2 + [2], (16, 2)),
    ],
)
def test_split_train_with_tiny_classes(labels: list[float], sizes: tuple[int, int]) -> None:
    train, selection = split_train(toy(labels), CLASSES)
    assert (len(train), len(selection)) == sizes
    if max(Counter(labels).values()) > 1:
        assert set(counts(train)) == set(map(int, labels))


def test_split_train_of_a_regression_is_a_plain_shuffle() -> None:
    train, selection = split_train(toy([index / 7 for index in range(40)], VALUES), VALUES, 0.25)
    assert (len(train), len(selection)) == (30, 10)


def test_what_cannot_be_drawn_is_refused() -> None:
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(TaskError, match="expected a number between 0 and 1"):
            split_train(toy([0, 1]), CLASSES, fraction)
    with pytest.raises(TaskError, match="1 training rows cannot be split"):
        split_train(toy([0]), CLASSES)
    for num_examples in (0, -1, 5):
        with pytest.raises(TaskError, match="expected 1 to 4"):
            few_shot(toy([0, 1, 0, 1]), CLASSES, num_examples, seed=0)
    with pytest.raises(TaskError, match="expected at least 1"):
        subsample(toy([0, 1]), 0)


def test_few_shot_keeps_proportions_every_class_and_the_range_of_values() -> None:
    dataset = toy([0] * 800 + [1] * 190 + [2] * 10)
    assert counts(few_shot(dataset, CLASSES, 200, seed=0)) == {0: 160, 1: 38, 2: 2}
    assert counts(few_shot(dataset, CLASSES, 10, seed=0)) == {0: 8, 1: 1, 2: 1}
    assert set(counts(few_shot(dataset, CLASSES, 3, seed=0))) == {0, 1, 2}
    assert len(few_shot(dataset, CLASSES, 2, seed=0)) == 2
    assert len(few_shot(dataset, CLASSES, 1000, seed=0)) == 1000
    dataset = toy([0, 1] * 200)
    draws = [tuple(few_shot(dataset, CLASSES, 50, seed=seed)["text"][:]) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    dataset = toy([index / 100 for index in range(500)], VALUES)
    values = few_shot(dataset, VALUES, 10, seed=0)["label"][:]
    assert sorted(int(value * 2 + 1e-6) for value in values) == list(range(10))  # one from each tenth


def test_subsample() -> None:
    dataset = toy([0] * 60 + [1] * 30 + [2] * 10)
    assert counts(subsample(dataset, 20)) == {0: 12, 1: 6, 2: 2}
    assert subsample(dataset, 20)["text"][:] == subsample(dataset, 20)["text"][:]
    assert subsample(dataset, 20)["text"][:] != subsample(dataset, 20, seed=7)["text"][:]
    assert subsample(dataset, 100) is dataset
    assert len(subsample(toy([0.5, 1.5, 2.5], VALUES), 2)) == 2
    dataset = toy([0, 1, 2] * 10)  # whose labels are read whatever its format is
    assert counts(subsample(dataset.with_format("numpy"), 6).with_format(None)) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("trial", range(20))
def test_pick_gives_what_was_asked_within_its_bounds(trial: int) -> None:
    rng = random.Random(trial)
    sizes = [rng.randint(1, 30) for _ in range(rng.randint(1, 12))]
    indices = iter(range(sum(sizes)))
    groups = {key: [next(indices) for _ in range(size)] for key, size in enumerate(sizes)}
    keep, least = rng.randint(0, 2), rng.randint(0, 1)
    room = sum(max(0, size - keep) for size in sizes)
    total = rng.randint(1, sum(sizes))
    chosen = pick(groups, total, rng, least=least, keep=keep)
    assert len(chosen) == len(set(chosen)) == min(total, room)
    for members in groups.values():
        taken = len(set(members) & set(chosen))
        assert taken <= max(0, len(members) - keep)
        if total >= least * len(groups):
            assert taken >= min(least, max(0, len(members) - keep))
