"""Inspecting trained runs, and the paper's figure from start to finish, small."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.models import adapted
from tests.tiny import topics_rows

from sparsepeft.errors import UserError
from sparsepeft.inspection import inspect_run
from sparsepeft.training import RunConfig, train
from sparsepeft_research.reproduction.figure2 import AnnealTopK, reproduce_figure2

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
        ({"split": "train"}, "split of topics 'train' is unknown; valid are test, validation"),
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


@pytest.fixture
def bbc(tmp_path: Path) -> Path:
    """Data in the form of BBC News, with texts of the built-in sample."""
    names = {"health": "politics", "science": "tech", "travel": "entertainment"}
    rows = [f"{row['text']}\t{names.get(row['label'], row['label'])}" for row in topics_rows("train")[::3]]
    (tmp_path / "bbc-news").mkdir()
    (tmp_path / "bbc-news" / "all.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return tmp_path


def test_figure_2(tiny_backbone: Path, bbc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "figure2"
    values = {"model": str(tiny_backbone), "data_dir": str(bbc), "epochs": 1}
    report = reproduce_figure2(output, **values)
    last = report.layers[-1]
    assert (last.num_parents, last.num_children, last.top_k) == (5, 1, 2)
    assert report.untrained is not None
    for name in ("figure2.png", "figure2.svg", "inspection.html", "inspection.json", "nmi.svg", "layer-1-picks.png"):
        assert (output / name).stat().st_size > 1000, name
    written = json.loads((output / "inspection.json").read_text())
    assert written["environment"]["versions"]["torch"]
    assert written["source"]["split"] == "test"
    assert str(tmp_path) not in (output / "inspection.json").read_text() + (output / "inspection.html").read_text()

    def never(*args: object) -> None:
        raise AssertionError("a finished training was repeated")

    monkeypatch.setattr("sparsepeft_research.reproduction.figure2.train", never)
    for name in ("write_inspection", "save_figure"):  # drawing takes its time
        monkeypatch.setattr(f"sparsepeft_research.reproduction.figure2.{name}", lambda *args: None)
    assert reproduce_figure2(output, **values) == report
    with pytest.raises(UserError, match="finished run with other values of settings"):
        reproduce_figure2(output, top_k=3, **values)


def test_k_falls_while_training() -> None:
    model = adapted("bert", num_parents=5, top_k=2)
    seen = []
    for step in range(20):
        AnnealTopK().on_step_begin(None, SimpleNamespace(global_step=step, max_steps=20), None, model=model)
        seen.append(model.get_base_model().bert.encoder.layer[0].spartan_memory["default"].top_k)
    assert seen == [5, 5, 5, 4, 4, 3, 3, 3, *[2] * 12]
