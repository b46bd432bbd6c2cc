"""Several labels per text from training to answers: the loss, the files, and everything that reads a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import topics_rows, write_jsonl

from sparsepeft import MultiTaskEngine
from sparsepeft.inspection import inspect_run
from sparsepeft.runs.files import RUN, spec_of
from sparsepeft.training import Predictor, RunConfig, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the built-in sample, whose texts also say whether they are long; two topics are named by no label."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {
            "text": row["text"],
            "tags": [*({row["label"]} - {"sport", "travel"}), *(["long"] if len(row["text"]) > 138 else [])],
        }
        for row in topics_rows("train")
    ]
    config = RunConfig(
        task="custom",
        output_dir=str(folder / "out"),
        model=str(tiny_backbone),
        train_file=str(write_jsonl(folder / "train.jsonl", rows)),
        label_column="tags",
        max_steps=12,
        batch_size=8,
    )
    results = train(config)
    assert results["main_metric"] == "micro_f1"
    assert set(results["metrics"]["validation"]) == {"micro_f1", "macro_f1", "subset_accuracy"}
    return folder / "out"


def test_a_run_says_what_it_is(trained: Path) -> None:
    spec = spec_of(json.loads((trained / RUN).read_text()))
    assert spec.multi_label
    assert spec.label_names == ("business", "health", "long", "science")
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


def test_answers_have_the_labels_above_a_half(trained: Path, tiny_backbone: Path) -> None:
    texts = [row["text"] for row in topics_rows("test")[:8]]
    predictions = Predictor(trained).predict(texts)
    engine = MultiTaskEngine(tiny_backbone, {"tags": trained})
    for one, other in zip(predictions, engine.predict([("tags", text) for text in texts]), strict=True):
        assert one.labels == tuple(label for label, score in one.scores.items() if score > 0.5) == other.labels
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_parents_are_shown_without_labels(trained: Path) -> None:
    report = inspect_run(trained)
    assert report.label_names is None
    assert any("several per text" in note for note in report.notes)
