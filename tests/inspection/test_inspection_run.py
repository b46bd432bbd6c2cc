"""Inspecting trained runs, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import topics_rows

from sparsepeft.errors import UserError
from sparsepeft.inspection import inspect_run
from sparsepeft.training import RunConfig, train

pytestmark = pytest.mark.slow


def test_a_trained_run(trained: Path) -> None:
    report = inspect_run(trained, compare_untrained=True, keep_stop_words=True)
    assert report.source["task"] == "topics"
    assert (report.source["split"], report.source["examples"]) == ("test", 120)
    assert report.label_names == ("business", "health", "science", "sport", "travel")
    assert [layer.index for layer in report.layers] == [0, 1]
    assert report.untrained is not None
    for layer, fresh in zip(report.layers, report.untrained.layers, strict=True):
        assert layer.documents == fresh.documents == 120 == sum(parent.documents for parent in layer.parents)
        assert sum(parent.share_first for parent in layer.parents) == pytest.approx(1)
        assert sum(parent.share_picked for parent in layer.parents) == pytest.approx(1)
        assert layer.nmi_documents is not None
        assert layer.moved > fresh.moved == 0
    words = [word.word for layer in report.layers for parent in layer.parents for word in parent.words]
    assert words
    assert not {"[cls]", "[sep]", "[pad]", "[CLS]", "[PAD]"} & set(words)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["parents"][0]["index"] == 0


def test_splits_layers_and_samples(trained: Path) -> None:
    report = inspect_run(trained, split="validation", layer=1, max_examples=10, batch_size=3)
    assert (report.source["split"], report.source["examples"]) == ("validation", 10)
    assert [layer.index for layer in report.layers] == [1]
    assert report.layers[0].documents == 10
    for wrong, words in (
        ({"split": "train"}, "The split of topics 'train' is unknown; valid are test, validation"),
        ({"layer": 6}, "`layer=6` was given, but that layer has no memory; choose one of 0, 1"),
    ):
        with pytest.raises(UserError, match=words):
            inspect_run(trained, **wrong)


def test_a_run_of_another_method(tiny_backbone: Path, tmp_path: Path) -> None:
    train(RunConfig(task="topics", method="head", model=str(tiny_backbone), output_dir=str(tmp_path), max_steps=1))
    with pytest.raises(UserError, match="has no SPARTAN memory to inspect"):
        inspect_run(tmp_path)
    with pytest.raises(UserError, match=r"run\.json is missing"):
        inspect_run(tmp_path / "nothing")


def test_values_are_binned_by_quantiles(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = [f"{row['text']}\t{number / 10}" for number, row in enumerate(topics_rows("train")[:60])]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    file, folder = str(tmp_path / "rows.tsv"), str(tmp_path / "run")
    own = {"train_file": file, "validation_file": file}
    train(RunConfig(task="custom", model=str(tiny_backbone), output_dir=folder, max_steps=1, **own))
    report = inspect_run(folder)
    assert report.source["split"] == "validation"
    assert report.label_names is not None
    assert report.label_names[0].startswith("up to ")
    assert len(report.label_names) == 5
    first = [sum((p.labels_documents or {})[name] for p in report.layers[0].parents) for name in report.label_names]
    assert first == [12] * 5
