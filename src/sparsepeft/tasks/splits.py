"""Seeded, stratified parts of a dataset, drawn with Python's `random`, whose sequences do not change with versions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import TaskError
from sparsepeft.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

MAX_BINS = 10  # quantile bins of a regression's labels


def split_train(dataset: Dataset, spec: TaskSpec, fraction: float = 0.1, seed: int = 42) -> tuple[Dataset, Dataset]:
    """Hold out part of the training data for choosing checkpoints and hyperparameters.

    Classification is stratified by label; a class keeps at least one example for training, so a class with a single
    example is never held out (unless every class has but one). Rows with several labels, and sentences with a tag for
    each token, are stratified by the rarest of theirs. Regression is a plain seeded shuffle.

    Returns:
        ``(train, selection)``, both in the dataset's order; ``selection`` has ``fraction`` of the rows, at least one.

    Raises:
        TaskError: ``fraction`` is not between 0 and 1, or there are fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise TaskError(f"{spec.name}: the held-out fraction is {fraction}; expected a number between 0 and 1")
    if len(dataset) < 2:
        raise TaskError(f"{spec.name}: {len(dataset)} training rows cannot be split; expected at least 2, add examples")
    groups = _groups(labels_of(dataset)) if spec.label_names is not None else {0: [*range(len(dataset))]}
    chosen = set(hold_out(groups, fraction, _rng("split_train", seed)))
    rest = [index for index in range(len(dataset)) if index not in chosen]
    return dataset.select(rest), dataset.select(sorted(chosen))


def few_shot(dataset: Dataset, spec: TaskSpec, num_examples: int, seed: int) -> Dataset:
    """Draw ``num_examples`` rows by seed, in the proportions of the labels and with every class where that is possible.

    Regression labels are stratified by quantile bins, ten at most.

    Raises:
        TaskError: ``num_examples`` is not between 1 and the number of rows.
    """
    if not 1 <= num_examples <= len(dataset):
        raise TaskError(
            f"{spec.name}: {num_examples} examples asked for; expected 1 to {len(dataset)}, the number of training rows"
        )
    chosen = pick(_strata(dataset, num_examples), num_examples, _rng("few_shot", seed), least=1)
    return dataset.select(sorted(chosen))


def subsample(dataset: Dataset, n: int, seed: int = 42) -> Dataset:
    """Draw at most ``n`` rows by seed, stratified by label (float labels: by quantile bins).

    With ``n`` at least the number of rows the dataset itself comes back.

    Raises:
        TaskError: ``n`` is below 1.
    """
    if n < 1:
        raise TaskError(f"a subsample of {n} rows was asked for; expected at least 1")
    if n >= len(dataset):
        return dataset
    return dataset.select(sorted(pick(_strata(dataset, n), n, _rng("subsample", seed), least=1)))


def hold_out(groups: Mapping[Any, Sequence[int]], fraction: float, rng: random.Random) -> list[int]:
    """Choose about ``fraction`` of all indices, at least one, by group; each group keeps one for the other side."""
    size = sum(map(len, groups.values()))
    total = max(1, round(size * fraction))
    chosen = pick(groups, total, rng, keep=1)
    if chosen:
        return chosen
    return rng.sample(sorted(index for members in groups.values() for index in members), total)


def pick(
    groups: Mapping[Any, Sequence[int]], total: int, rng: random.Random, *, least: int = 0, keep: int = 0
) -> list[int]:
    """Choose ``total`` indices in the proportions of the groups (largest remainder, ties by seed).

    Args:
        groups: indices by group.
        total: how many to choose; fewer come back only where ``keep`` forbids more.
        rng: decides the members and the ties.
        least: choose at least so many from each group, where ``total`` allows it.
        keep: leave at least so many in each group.
    """
    keys = sorted(groups)
    rng.shuffle(keys)
    sizes = {key: len(groups[key]) for key in keys}
    room = {key: max(0, sizes[key] - keep) for key in keys}
    quota = {key: total * sizes[key] / sum(sizes.values()) for key in keys}
    floor = least if total >= least * len(keys) else 0
    count = {key: min(max(int(quota[key]), floor), room[key]) for key in keys}
    while sum(count.values()) > total:  # the floor lifted small groups: take from the most over-served
        count[max((key for key in keys if count[key] > floor), key=lambda key: count[key] - quota[key])] -= 1
    while sum(count.values()) < total and any(count[key] < room[key] for key in keys):
        count[max((key for key in keys if count[key] < room[key]), key=lambda key: quota[key] - count[key])] += 1
    return [index for key in sorted(groups) for index in rng.sample(sorted(groups[key]), count[key])]


def labels_of(dataset: Dataset) -> list[Any]:
    """The labels as Python numbers, whatever format the dataset is set to."""
    return list(dataset.with_format(None)["label"][:])


def _strata(dataset: Dataset, num_examples: int) -> Mapping[Any, list[int]]:
    """Rows by label, by the rarest of several, or by quantile of a value."""
    labels = labels_of(dataset)
    return _bins(labels, num_examples) if labels and isinstance(labels[0], float) else _groups(labels)


def _groups(labels: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(_rarest(labels) if labels and isinstance(labels[0], list) else labels):
        groups.setdefault(label, []).append(index)
    return groups


def _rarest(labels: Sequence[Sequence[float]]) -> list[int]:
    """Of each row's ones, or its tokens' classes, the one that fewest rows have; -1 for a row without any."""
    are_classes = bool(labels[0]) and isinstance(labels[0][0], int)
    present = [
        sorted({int(value) for value in row}) if are_classes else [i for i, value in enumerate(row) if value]
        for row in labels
    ]
    counts = Counter(index for row in present for index in row)
    return [min(ones, key=lambda index: (counts[index], index), default=-1) for ones in present]


def _bins(labels: Sequence[float], num_examples: int) -> dict[int, list[int]]:
    values = list(labels)
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    num_bins = min(MAX_BINS, num_examples)
    groups: dict[int, list[int]] = {}
    for rank, index in enumerate(order):
        groups.setdefault(rank * num_bins // len(order), []).append(index)
    return groups


def _rng(purpose: str, seed: int) -> random.Random:
    # The purpose is part of the seed: a few-shot draw and a split by the same seed must not be related.
    return random.Random(f"{purpose}:{seed}")
