"""What is called noise: intervals and tests against values worked out by hand, and the kinds of tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsepeft.comparison.noise import LEVEL, RESAMPLES, Scorer
from sparsepeft.tasks import TaskSpec

CLASSES = TaskSpec("own", ("text",), ("a", "b"), ("accuracy", "macro_f1"), "accuracy", 10)
VALUES = TaskSpec("own", ("text",), None, ("pearson", "spearman", "mae", "rmse"), "pearson_spearman", 10)
SEVERAL = TaskSpec("own", ("text",), ("a", "b", "c"), ("micro_f1", "macro_f1"), "micro_f1", 10, multi_label=True)


def right_but(wrong: int, count: int = 40, start: int = 0) -> np.ndarray:
    """Logits (1, N, 2) of which so many, from one row on, are wrong; the truth is class 0 throughout."""
    logits = np.tile([1.0, 0.0], (count, 1))
    logits[start : start + wrong] = (0.0, 1.0)
    return logits[None]


def zeros(count: int = 40) -> np.ndarray:
    return np.zeros(count, dtype=int)


@pytest.mark.parametrize(
    ("wrong", "count", "low", "high"), [(0, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (10, 10, 0.0, 0.2775)]
)
def test_wilsons_interval(wrong: int, count: int, low: float, high: float) -> None:
    found = Scorer(CLASSES, zeros(count)).interval(right_but(wrong, count))
    assert found == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("disagreeing", "is_noise"), [(0, True), (1, True), (5, True), (6, False), (12, False)])
def test_rows_on_which_only_the_best_is_right(disagreeing: int, is_noise: bool) -> None:
    """By the sign test p is 2 / 2^k for k such rows: 0.0625 for 5, 0.031 for 6."""
    scorer = Scorer(CLASSES, zeros())
    best, other = right_but(0), right_but(disagreeing)
    assert scorer.is_within_noise(best, other) == is_noise
    p = scorer._p_value(best, other, disagreeing / 40)
    exact = min(1.0, 2 * 0.5**disagreeing)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / RESAMPLES) + 2 / RESAMPLES


def test_what_is_right_on_other_rows_is_noise_but_pairs_tell_more_than_scores() -> None:
    scorer = Scorer(CLASSES, zeros())
    assert scorer.is_within_noise(right_but(10), right_but(12, start=20))  # 22 rows disagree, 12 against 10
    assert not scorer.is_within_noise(right_but(10), right_but(20))  # 10 rows disagree, all in one direction
    assert scorer.is_within_noise(right_but(12), right_but(0))  # which is not worse at all


def test_seeds_that_differ_more_than_the_methods() -> None:
    scorer = Scorer(CLASSES, zeros())
    best, other = (np.concatenate([right_but(wrong) for wrong in each]) for each in ((0, 16), (10, 22)))
    assert not scorer.is_within_noise(best[:1], other[:1])
    assert scorer.is_within_noise(best, other)  # 0.80 ± 0.28 against 0.60 ± 0.21
    steady = np.concatenate([right_but(20), right_but(21)])
    assert not scorer.is_within_noise(np.concatenate([right_but(0), right_but(1)]), steady)


@pytest.mark.parametrize("spec", [VALUES, SEVERAL], ids=["values", "several labels"])
def test_other_metrics(spec: TaskSpec) -> None:
    random = np.random.default_rng(1)
    if spec is VALUES:
        labels = random.normal(size=50)
        good = labels[None, :, None] + 0.3 * random.normal(size=(1, 50, 1))
        constant = np.full((1, 50, 1), 0.5)
    else:
        labels = (random.random((50, 3)) < 0.4).astype(float)
        good = labels[None] * 2 - 1 + 0.6 * random.normal(size=(1, 50, 3))
        constant = np.full((1, 50, 3), -1.0)
    scorer = Scorer(spec, labels)
    (score,) = scorer.scores(good)
    assert score == pytest.approx(spec.compute_metrics(good[0], labels)[spec.main_metric])
    low, high = scorer.interval(good)
    assert low < score < high < 1.0 + 1e-9
    assert high - low < 0.3
    assert not scorer.is_within_noise(good, constant)
    assert scorer.is_within_noise(good, good + 0.02 * random.normal(size=good.shape))
    assert scorer._p_value(good, constant, score) < LEVEL
