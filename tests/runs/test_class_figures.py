"""Figures of how each class is recognised: what they show, of how many classes, and of which runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepeft.errors import UserError
from sparsepeft.runs import class_figures
from sparsepeft.runs.class_figures import plot_classes, read_report

BEFORE = Path(__file__).parent.parent / "fixtures" / "before" / "runs"


def scores(count: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = ["$x$ & <y>", "a label of many more words than fit", *(f"class {number}" for number in range(2, count))]
    return {name: {key: rng.random() for key in ("precision", "recall", "f1")} | {"support": 1234} for name in names}


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("count", [3, 30, 150])
def test_confusions_and_bars(tmp_path: Path, count: int, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    report: dict[str, Any] = {"per_class": scores(count)}
    plot_classes(report, tmp_path / f"bars.{suffix}", "a run")
    counts = np.random.default_rng(1).integers(0, 9, (count, count)) + 50 * np.eye(count, dtype=int)
    counts[2, 1] = 777
    report["confusion_matrix"] = counts.tolist()
    plot_classes(report, tmp_path / f"confusions.{suffix}", "a run")
    for name, most, rest in (("bars", 60, "with the lowest F1"), ("confusions", 40, "with the most mistakes")):
        path = tmp_path / f"{name}.{suffix}"
        assert path.stat().st_size > 3000
        if suffix == "svg":
            text = path.read_text()
            assert ("a label of many more wo…" in text) or count > most
            assert (f"{most} of 150 classes, those {rest}" in text) == (count > most)
            assert (">777<" in text) == (name == "confusions" and count == 3)


def test_the_worst_classes_are_the_ones_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(class_figures, "MOST_CONFUSIONS", 2)
    counts = np.array([[9, 0, 1], [0, 9, 0], [5, 0, 4]])
    figure = class_figures._confusions(["a", "b", "c"], counts, "")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "c"]
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.9, 0.1], [5 / 9, 4 / 9]])
    assert [text.get_text() for text in axis.texts] == ["9", "1", "5", "4"]


def test_reports_of_runs(tmp_path: Path) -> None:
    name, report = read_report(BEFORE / "spartan")  # of an earlier version
    results = json.loads((BEFORE / "spartan" / "results.json").read_text())
    assert (name, report) == (results["score_split"], results["report"])
    with pytest.raises(UserError, match=r"`part`: 'tset' is unknown; valid are validation"):
        read_report(BEFORE / "spartan", "tset")
    with pytest.raises(UserError, match="holds no run"):
        read_report(tmp_path)
    with pytest.raises(UserError, match="has no classes to draw"):
        read_report(BEFORE / "lm")
