"""Thresholds of several labels: the best there are, what is done with few examples, and that metrics take them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from sparsepeft.inference.portable import prediction
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.metrics import report
from sparsepeft.tasks.thresholds import LEAST_POSITIVES, choose_thresholds, cuts

SPEC = TaskSpec("t", ("text",), tuple("abcd"), ("macro_f1", "micro_f1", "subset_accuracy"), "macro_f1", 1, True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.fixture
def answer() -> tuple[np.ndarray, np.ndarray]:
    """Logits of four labels that are told apart more or less well, the last two by few rows, with ties."""
    rng = np.random.default_rng(0)
    labels = rng.random((600, 4)) < [0.3, 0.1, 0.02, 0.0]
    logits = rng.normal(size=(600, 4)) + labels * [2.0, 1.0, 2.0, 0.0] - [1.0, 3.0, 4.0, 5.0]
    return np.round(logits, 1).astype(np.float32), labels.astype(np.float32)


def test_no_other_threshold_is_better(answer: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = answer
    chosen = choose_thresholds(logits, labels)
    assert labels.sum(axis=0)[1] >= LEAST_POSITIVES > labels.sum(axis=0)[2] > labels.sum(axis=0)[3] == 0
    probabilities = sigmoid(logits)
    tried = np.unique(np.concatenate([[0.0], probabilities.ravel()]))
    for label in (0, 1):
        best = max(f1_score(labels[:, label], probabilities[:, label] > one, zero_division=0.0) for one in tried)
        assert f1_score(labels[:, label], probabilities[:, label] > chosen[label]) == pytest.approx(best)
        assert chosen[label] not in probabilities
    assert chosen[2] == chosen[3]  # shared, and the best for both together
    rare = (labels[:, 2:].ravel(), probabilities[:, 2:].ravel())
    best = max(f1_score(rare[0], rare[1] > one, zero_division=0.0) for one in tried)
    assert f1_score(rare[0], rare[1] > chosen[2]) == pytest.approx(best)


def test_metrics_and_answers_take_the_same_labels(answer: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = answer
    chosen = choose_thresholds(logits, labels)
    held = sigmoid(logits) > np.array(chosen)
    scores = SPEC.compute_metrics(logits, labels, chosen)
    assert scores["micro_f1"] == pytest.approx(f1_score(labels, held, average="micro"))
    assert scores["macro_f1"] > SPEC.compute_metrics(logits, labels)["macro_f1"]
    assert report(SPEC, logits, labels, chosen)["per_class"]["b"]["f1"] == pytest.approx(
        f1_score(labels[:, 1], held[:, 1])
    )
    assert SPEC.compute_metrics(logits, labels, [0.5] * 4) == SPEC.compute_metrics(logits, labels)
    for row, holds in zip(logits[:50], held, strict=False):
        answered = prediction(row, SPEC.label_names, multi_label=True, thresholds=chosen)
        assert answered.labels == tuple(name for name, one in zip("abcd", holds, strict=True) if one)
        assert list(answered.scores.values()) == pytest.approx(sigmoid(row).tolist())


@pytest.mark.parametrize("logits", [np.full((4, 2), np.nan), np.full((4, 2), 1e9), np.full((4, 2), -np.inf)])
def test_models_that_say_nothing(logits: np.ndarray) -> None:
    assert choose_thresholds(logits, np.zeros((4, 2))) == (0.5, 0.5)
    chosen = choose_thresholds(logits, np.ones((4, 2)))
    assert all(0 <= one < 1 for one in chosen)
    assert np.isfinite(cuts([0.5, 0.001])).all()
    assert cuts(None) == 0
