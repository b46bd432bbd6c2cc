"""Several labels per text from training to answers: the loss, the files, and everything that reads a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import run_config, topics_rows, write_jsonl

from sparsepeft import MultiTaskEngine
from sparsepeft.inspection import inspect_run
from sparsepeft.runs.files import RUN, spec_of
from sparsepeft.training import Predictor, train


@pytest.mark.slow
def test_several_labels_from_training_to_answers(tiny_backbone: Path, tmp_path: Path) -> None:
    """The built-in sample, whose texts also say whether they are long; two topics are named by no label."""
    rows = [
        {"text": row["text"], "tags": [*({row["label"]} - {"sport", "travel"}), *["long"] * (len(row["text"]) > 138)]}
        for row in topics_rows("train")
    ]
    out, file = tmp_path / "out", str(write_jsonl(tmp_path / "train.jsonl", rows))
    results = train(run_config(tiny_backbone, out, task="custom", train_file=file, label_column="tags"))
    assert results["main_metric"] == "micro_f1"
    assert set(results["metrics"]["validation"]) == {"micro_f1", "macro_f1", "subset_accuracy"}

    spec = spec_of(json.loads((out / RUN).read_text()))
    assert spec.multi_label
    assert spec.label_names == ("business", "health", "long", "science")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"

    texts = [row["text"] for row in topics_rows("test")[:8]]
    engine = MultiTaskEngine(tiny_backbone, {"tags": out})
    answers = engine.predict([("tags", text) for text in texts])
    for one, other in zip(Predictor(out).predict(texts), answers, strict=True):
        assert one.labels == tuple(label for label, score in one.scores.items() if score > 0.5) == other.labels
        assert one.scores == pytest.approx(other.scores, abs=1e-4)

    report = inspect_run(out)  # shows parents without labels
    assert report.label_names is None
    assert any("several per text" in note for note in report.notes)
