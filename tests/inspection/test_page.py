"""Figures and the page: they stand alone, say everything in words too, and escape what they are given."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "sparsepeft[plots]"')

import numpy as np
import torch

from sparsepeft.errors import UserError
from sparsepeft.folders import locked
from sparsepeft.inspection import LayerReport, MemoryReport
from sparsepeft.inspection.figures import label_figure, nmi_figure, picks_figure, save_figure
from sparsepeft.inspection.page import render_page, write_inspection
from sparsepeft.inspection.picks import Picks
from sparsepeft.inspection.report import layer_report
from sparsepeft.layers import SparseMemory
from sparsepeft.plotting import COLOURS

EVIL = "<script>alert('$x^$')</script>&"


def layer(index: int, labels: tuple[str, ...], num_parents: int = 3, num_children: int = 2) -> LayerReport:
    torch.manual_seed(index)
    picks = Picks(SparseMemory(4, num_parents, num_children, 2, initializer_range=1), max(1, len(labels)))
    rows = np.arange(60) // 3
    classes = rows % len(labels) if labels else np.full(60, -1)
    with torch.inference_mode():
        picks.add(torch.randn(60, 4), rows, 20, classes)
    picks.finish_batch(classes[::3])
    words = [[(EVIL, 3, 1.5, 4.0), ("goal", 2, 1.2, 2.5)] for _ in range(num_parents)]
    return layer_report(index, f"encoder.{index}", picks, labels, words)


def report(labels: tuple[str, ...] = ("sport", EVIL), **changes: Any) -> MemoryReport:
    layers = changes.pop("layers", None) or [layer(index, labels) for index in range(2)]
    made = MemoryReport("default", labels or None, layers, notes=(EVIL,), source={"task": EVIL, "examples": 20})
    return dataclasses.replace(made, **changes)


class Page(html.parser.HTMLParser):
    """What a browser would make of it: elements, their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_else_and_escapes() -> None:
    text = render_page(report(untrained=report()), title=EVIL)
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(tags)
    links = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert all((link or "").startswith("#") for link in links)
    assert not [k for _, attrs in page.elements for k in attrs if k.startswith("on")]
    assert "<script" not in text
    assert any(EVIL in shown for shown in page.texts)  # shown as it was written
    assert "untrained, documents" in text


def test_every_drawing_is_also_said_in_words() -> None:
    page = Page(render_page(report()))
    drawings = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert len(drawings) == 5  # labels and picks of two layers, information by layer
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 30
    assert [attrs.get("lang") for tag, attrs in page.elements if tag == "html"] == ["en"]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {"layer-0", "layer-1"} <= set(ids)


def test_without_labels() -> None:
    page = render_page(report(labels=()))
    assert "purity</th>" not in page
    assert len(re.findall("<svg", page)) == 2
    with pytest.raises(ValueError, match="without labels"):
        label_figure(layer(0, ()))
    with pytest.raises(ValueError, match="without labels"):
        nmi_figure(report(labels=()))


def test_many_labels_and_parents_differ_in_more_than_colour() -> None:
    labels = tuple(f"label {i}" for i in range(2 * len(COLOURS)))
    figure = label_figure(layer(0, labels, num_parents=40))
    looks = {(h.get_facecolor(), h.get_hatch()) for h in figure.legends[0].get_patches()}
    assert len(looks) == len(labels)
    assert len(figure.axes[0].get_yticklabels()) == 24
    assert len(picks_figure(layer(0, labels, num_parents=40)).axes[0].get_xticklabels()) == 24


def test_files(tmp_path: Path) -> None:
    shown = report(layers=[layer(0, ("sport", EVIL))])
    write_inspection(shown, tmp_path / "new" / "folder")
    names = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    stems = ["layer-0-labels", "layer-0-picks", "nmi"]
    figures = [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert names == sorted([*figures, "inspection.html", "inspection.json"])
    png, svg = save_figure(nmi_figure(shown), tmp_path / "nmi")
    assert svg.read_bytes() == (tmp_path / "new" / "folder" / "nmi.svg").read_bytes()
    assert png.read_bytes()[:4] == b"\x89PNG"
    with locked(tmp_path), pytest.raises(UserError, match="Another process is writing to"):
        write_inspection(shown, tmp_path)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "sparsepeft\[plots\]"'):
        write_inspection(report(), tmp_path)
