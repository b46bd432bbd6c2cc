"""The paper's Figure 2: training, inspection and files, once; and K that falls while training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.models import adapted
from tests.tiny import topics_rows

from sparsepeft.errors import UserError
from sparsepeft_research.reproduction.figure2 import AnnealTopK, reproduce_figure2

pytestmark = pytest.mark.slow


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
