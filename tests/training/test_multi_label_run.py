"""Several labels per text from training to answers: the loss, thresholds, files, and everything that reads a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import run_config, topics_rows, write_jsonl

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.inspection import inspect_run
from sparsepeft.runs.config_values import read_columns, read_thresholds
from sparsepeft.runs.files import read_run, spec_of, thresholds_of
from sparsepeft.tasks import TaskSpec
from sparsepeft.training import Predictor, RunConfig, evaluate, load_config, train
from sparsepeft.training.thresholds import check_thresholds, thresholds_by

NAMES = ("business", "health", "long", "science")
SPEC = TaskSpec("tags", ("text",), ("a", "b"), ("micro_f1",), "micro_f1", 1, multi_label=True)


def tags_of(row: dict[str, str]) -> set[str]:
    """The topic, of which two are named by no label, and whether the text is long."""
    return ({row["label"]} | ({"long"} if len(row["text"]) > 138 else set())) & set(NAMES)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{"text": row["text"]} | {name: int(name in tags_of(row)) for name in NAMES} for row in topics_rows("train")]


@pytest.fixture(scope="module")
def run(
    tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """A run on columns of 0 and 1, and its results."""
    root = tmp_path_factory.mktemp("run")
    file = str(write_jsonl(root / "train.jsonl", rows))
    options = {"max_steps": 40, "learning_rate": 0.01, "eval_steps": 20}
    return root / "out", train(run_config(tiny_backbone, root / "out", task="custom", train_file=file, **options))


@pytest.mark.slow
def test_thresholds_are_chosen_stored_and_told(run: tuple[Path, dict[str, Any]]) -> None:
    folder, results = run
    stored = read_run(folder)
    spec, thresholds = spec_of(stored), thresholds_of(stored)
    assert (spec.label_names, spec.multi_label, results["main_metric"]) == (NAMES, True, "micro_f1")
    assert thresholds is not None
    assert results["thresholds"] == dict(zip(NAMES, thresholds, strict=True))
    assert set(results["metrics"]["validation"]) == {"micro_f1", "macro_f1", "subset_accuracy"}
    assert results["metrics"] != results["metrics_at_half"]
    assert results["reports"]["validation"] == results["report"]
    assert list(results["report"]["per_class"]) == list(NAMES)
    assert results["baseline"]["answer"] == ["long"]
    assert results["hyperparameters"]["thresholds"] == "selection"
    card = (folder / "README.md").read_text()
    for words in ("| holds above |", "| validation, with 0.5 as every label's threshold |"):
        assert words in card
    found = evaluate(folder)
    for name in ("metrics", "metrics_at_half"):
        assert getattr(found, name)["validation"] == pytest.approx(results[name]["validation"], abs=1e-6)
    assert found.report["validation"] == results["report"]
    assert found.to_dict()["metrics_at_half"].keys() == {"validation"}


@pytest.mark.slow
def test_every_answer_is_by_the_thresholds(run: tuple[Path, dict[str, Any]], tiny_backbone: Path) -> None:
    folder, results = run
    limits = results["thresholds"]
    texts = [row["text"] for row in topics_rows("test")]
    engine = MultiTaskEngine(tiny_backbone, {"tags": folder})
    alone, together = Predictor(folder).predict(texts), engine.predict([("tags", text) for text in texts])
    for one, other, named in zip(alone, together, engine.predict_all(texts), strict=True):
        assert one.labels == tuple(label for label, score in one.scores.items() if score > limits[label])
        assert one.labels == other.labels == named["tags"].labels
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    assert any(one.labels != tuple(name for name in NAMES if one.scores[name] > 0.5) for one in alone)


@pytest.mark.slow
def test_files_in_another_form_are_scored(
    run: tuple[Path, dict[str, Any]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    lists = [{"text": row["text"], "tags": [name for name in NAMES if row[name]]} for row in rows[:60]]
    files = [write_jsonl(tmp_path / "lists.jsonl", lists), write_jsonl(tmp_path / "columns.jsonl", rows[:60])]
    one, other = (evaluate(run[0], test_file=file) for file in files)
    assert one["test"] == other["test"]
    assert one.report == other.report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"), [({"few_shot": 40}, None), ({"thresholds": 0.5}, None), ({"thresholds": "0.3"}, 0.3)]
)
def test_runs_that_choose_none(
    tiny_backbone: Path, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], expected: float | None
) -> None:
    file = str(write_jsonl(tmp_path / "train.jsonl", rows[:100]))
    own = {"task": "custom", "train_file": file, "label_column": ["long", "health"], "text_column": "text"}
    results = train(run_config(tiny_backbone, tmp_path / "out", max_steps=4, **own, **options))
    stored = read_run(tmp_path / "out")
    assert stored["config"]["label_column"] == ["long", "health"]
    assert thresholds_of(stored) == (expected and (expected, expected))
    assert ("metrics_at_half" in results) == (expected is not None)
    assert evaluate(tmp_path / "out")["validation"] == pytest.approx(results["metrics"]["validation"], abs=1e-6)


@pytest.mark.slow
def test_memories_are_inspected_by_all_labels_of_a_text(run: tuple[Path, dict[str, Any]]) -> None:
    report = inspect_run(run[0])
    assert report.label_names == NAMES
    assert any("several labels is counted once for each" in note for note in report.notes)
    last = report.layers[-1]
    long = sum((parent.labels_documents or {})["long"] for parent in last.parents)
    assert long == run[1]["report"]["per_class"]["long"]["support"]
    for parent in last.parents:
        counts = parent.labels_documents or {}
        assert parent.purity == (max(counts.values()) / parent.documents if any(counts.values()) else None)


def test_thresholds_by_the_option() -> None:
    config = RunConfig("topics", "o")
    answer = np.array([[2.0, -2.0]] * 50), np.array([[1.0, 0.0]] * 50)
    assert thresholds_by(SPEC, config, None) is None
    assert thresholds_by(SPEC, config, answer) == (pytest.approx(0.5 / (1 + np.exp(-2))), 0.5)
    assert thresholds_by(SPEC, dataclasses.replace(config, thresholds=0.3), None) == (0.3, 0.3)
    single = TaskSpec("mail", ("text",), ("a", "b"), ("accuracy",), "accuracy", 1)
    assert thresholds_by(single, config, answer) is None
    check_thresholds(single, config)
    for spec, has in ((single, "one label"), (dataclasses.replace(single, label_names=None), "a value")):
        with pytest.raises(UserError, match=f"`thresholds` was given, but each example of mail has {has}"):
            check_thresholds(spec, dataclasses.replace(config, thresholds=0.5))


def test_what_the_options_may_be() -> None:
    assert [read_thresholds(value) for value in ("selection", "0.25", 0.25)] == ["selection", 0.25, 0.25]
    for value in ("half", 0, 1, "1.5", True, None, float("nan"), [0.5]):
        with pytest.raises(UserError, match=r"`thresholds=.*expected `thresholds=selection`, or a probability between"):
            read_thresholds(value)
    assert [read_columns(value) for value in (None, "a,b", ["a", "b"])] == [None, "a,b", ("a", "b")]
    for value in ([], [1], {"a": 1}, 3):
        with pytest.raises(UserError, match=r"`label_column=.*expected the name of a column, or a list of names"):
            read_columns(value)
    config = load_config({"task": "custom", "output_dir": "o", "train_file": "t.csv", "label_column": ["a", "b"]})
    assert RunConfig(**config.to_dict()) == config
    with pytest.raises(UserError, match="`thresholds` does not go with `task=lm`"):
        RunConfig("lm", "o", model="m", text="t.txt", thresholds=0.5)
