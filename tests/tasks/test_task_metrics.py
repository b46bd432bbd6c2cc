"""Metrics against values worked out by hand and against scikit-learn and SciPy; never NaN, never a warning."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from sparsepeft.tasks import TaskError, TaskSpec, task_names, task_spec
from sparsepeft.tasks.metrics import report

VALUES = TaskSpec("custom", ("text",), None, ("pearson", "spearman", "mae", "rmse"), "pearson_spearman", 10)
TAGS = TaskSpec(
    "custom", ("text",), tuple("abc"), ("micro_f1", "macro_f1", "subset_accuracy"), "micro_f1", 10, multi_label=True
)
MAIN = {"cola": "matthews_correlation", "mrpc": "accuracy_f1", "stsb": "pearson_spearman"}
MAIN |= {"goemotions": "macro_f1", "wnut17": "f1"}


def logits(classes: list[int], num_labels: int) -> np.ndarray:
    return np.eye(num_labels, dtype=np.float32)[classes]


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", [name for name in task_names() if name != "custom"])
def test_the_main_metric_is_reported(name: str) -> None:
    spec = task_spec(name)
    labels: Any = [0.5, 1.5, 2.5] if spec.label_names is None else [0, 1, 0]
    predictions: Any = labels if spec.label_names is None else logits([0, 1, 0], spec.num_labels)
    if spec.labels_tokens:
        labels, predictions = [labels], [predictions]
    if spec.multi_label:
        labels, predictions = np.eye(28), np.eye(28) - 0.5
    scores = spec.compute_metrics(predictions, labels)
    assert spec.main_metric == MAIN.get(name, "accuracy")
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))
    assert list(scores) == list(dict.fromkeys([*spec.metrics, spec.main_metric]))
    assert all(type(value) is float for value in scores.values())


def test_accuracy_f1_and_correlations_by_hand() -> None:
    # 2 true positives, 1 false positive, 1 false negative, 2 true negatives.
    guess, truth = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    scores = task_spec("qqp").compute_metrics(logits(guess, 2), truth)
    assert scores == pytest.approx({"accuracy": 4 / 6, "f1": 2 * 2 / (2 * 2 + 1 + 1)})
    guess, truth = [1, 1, 1, 1], [1, 1, 1, 0]
    scores = task_spec("mrpc").compute_metrics(logits(guess, 2), truth)
    assert scores == pytest.approx({"accuracy": 0.75, "f1": 6 / 7, "accuracy_f1": (0.75 + 6 / 7) / 2})
    # TP 3, TN 2, FP 1, FN 1: (3*2 - 1*1) / sqrt(4*4*3*3) = 5/12
    guess, truth = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0]
    scores = task_spec("cola").compute_metrics(logits(guess, 2), truth)
    assert scores == pytest.approx({"matthews_correlation": 5 / 12})
    # deviations -1 0 1 and -2 -1 3: sum of products 5, squares 2 and 14; ranks agree fully
    scores = task_spec("stsb").compute_metrics(np.array([[1.0], [2.0], [3.0]]), np.array([0.0, 1.0, 5.0], np.float32))
    pearson = 5 / math.sqrt(2 * 14)
    assert scores == pytest.approx({"pearson": pearson, "spearman": 1.0, "pearson_spearman": (pearson + 1) / 2})


def test_against_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    spec = TaskSpec("t", ("text",), tuple("abcde"), ("macro_f1", "matthews_correlation"), "macro_f1", 1)
    scores = spec.compute_metrics(logits(guess.tolist(), 5), truth)
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert scores["matthews_correlation"] == pytest.approx(matthews_corrcoef(truth, guess))
    x, y = np.round(rng.normal(size=100), 1), np.round(rng.normal(size=100), 1)  # rounded: with ties
    scores = task_spec("stsb").compute_metrics(x, y)
    assert scores["pearson"] == pytest.approx(pearsonr(x, y).statistic)
    assert scores["spearman"] == pytest.approx(spearmanr(x, y).statistic)


def test_errors_of_a_regression_by_hand() -> None:
    scores = VALUES.compute_metrics(np.array([1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 8.0])  # one is 4 too low
    assert scores["mae"] == 1.0
    assert scores["rmse"] == 2.0
    assert scores["pearson_spearman"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
    for value in (np.nan, np.inf):  # the worst there is, and finite
        scores = VALUES.compute_metrics(np.array([value, 1.0], np.float32), [0.0, 1.0])
        assert 1e38 < scores["mae"] < scores["rmse"] < math.inf


def test_several_labels_at_once_by_hand() -> None:
    logits = np.array([[2.0, -1, -1], [1, 1, -3], [-1, -2, np.nan]])
    truth = np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    scores = TAGS.compute_metrics(logits, truth)  # 2 true positives, 1 false positive, 1 false negative
    assert scores == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 1 / 3, "subset_accuracy": 1 / 3})
    by_class = report(TAGS, logits, truth)
    assert by_class["per_class"]["a"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    assert by_class["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert set(by_class) == {"per_class"}
    with pytest.raises(TaskError, match=r"expected \(N, 3\) and \(N, 3\)"):
        TAGS.compute_metrics(logits, [0, 1, 2])


def test_report_by_class() -> None:
    spec = task_spec("mnli")
    found = report(spec, logits([0, 0, 1, 1], 3), [0, 1, 1, 1])
    assert found["confusion_matrix"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert list(found["per_class"]) == list(spec.label_names or ())
    assert found["per_class"]["neutral"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3}
    assert found["per_class"]["contradiction"]["support"] == 0
    assert json.loads(json.dumps(found)) == found
    assert report(VALUES, [1.0, 2.0], [1.0, 2.0]) == {}


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.3, 1e30])
def test_constant_predictions_score_zero(constant: float) -> None:
    scores = task_spec("stsb").compute_metrics(np.full((5, 1), constant, np.float32), [0.0, 1, 2, 3, 4])
    assert scores == {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
    for guess, truth in (([1] * 4, [0, 1, 0, 1]), ([0, 1, 0, 1], [1] * 4), ([1] * 4, [1] * 4)):
        assert task_spec("cola").compute_metrics(logits(guess, 2), truth) == {"matthews_correlation": 0.0}
    assert task_spec("qqp").compute_metrics(logits([0, 0], 2), [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_extreme_scales_do_not_overflow() -> None:
    for scale in (1e300, 1e-300):
        scores = task_spec("stsb").compute_metrics(np.array([1.0, 2.0, 3.0]) * scale, [1.0, 2.0, 3.0])
        assert scores["pearson"] == pytest.approx(1.0)


def test_diverged_models_score_badly_instead_of_by_luck() -> None:
    broken = np.full((4, 2), np.nan)
    assert task_spec("sst2").compute_metrics(broken, [0, 0, 1, 0]) == {"accuracy": 0.0}
    assert task_spec("cola").compute_metrics(broken, [0, 0, 1, 0]) == {"matthews_correlation": 0.0}
    assert task_spec("bbc-news").compute_metrics(np.full((3, 5), np.nan), [0, 1, 2])["macro_f1"] == 0.0
    for value in (np.nan, np.inf):
        scores = task_spec("stsb").compute_metrics(np.array([value, 1.0, 2.0]), [0.0, 1.0, 2.0])
        assert scores["pearson_spearman"] == 0.0


@pytest.mark.parametrize(
    ("name", "shape", "num_labels"),
    [("sst2", (3, 2), 2), ("sst2", (3, 3), 3), ("sst2", (3,), 3), ("stsb", (3, 2), 3), ("sst2", (0, 2), 0)],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], num_labels: int) -> None:
    with pytest.raises(TaskError, match=rf"{name}: received predictions of shape"):
        task_spec(name).compute_metrics(np.zeros(shape), np.zeros(num_labels))
