"""Figures of an inspection, readable without colour. Needs the extra ``plots`` (matplotlib)."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from sparsepeft.folders import write_bytes
from sparsepeft.inspection.report import LayerReport, MemoryReport, ParentReport
from sparsepeft.plotting import COLOURS, MARKERS, STYLE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")

HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")  # one for each colour; a further round takes the next
MAX_PARENTS = 24  # drawn, the most used ones

# A "$" in a label is a dollar sign.
_STYLE = STYLE | {"hatch.linewidth": 0.6, "text.parse_math": False}
_WRITTEN_FROM = 0.08  # shares below have no room for a number


def _styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Run a drawing function under this module's style, whatever the caller's is."""

    @functools.wraps(draw)
    def styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        require_matplotlib()
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def label_figure(layer: LayerReport) -> Figure:
    """The labels of what picks each parent (the paper's Figure 2), of documents and of positions.

    Raises:
        ValueError: the layer was inspected without labels.
    """
    panels: dict[str, Callable[[ParentReport], dict[str, int] | None]] = {
        "documents, by the parent picked most": lambda parent: parent.labels_documents,
        "positions, by the first parent": lambda parent: parent.labels_positions,
    }
    panels = {title: counts for title, counts in panels.items() if any(counts(parent) for parent in layer.parents)}
    if not panels:
        raise ValueError(f"Layer {layer.index} was inspected without labels, so there is no distribution to draw.")
    from matplotlib.patches import Patch

    parents = most_used(layer)
    figure = _figure(4.2 * len(panels) + 1.2, 0.42 * len(parents) + 1.5)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, counts) in zip(axes, panels.items(), strict=True):
        _stacked_bars(axis, _labels(parents), [counts(parent) or {} for parent in parents])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("share of labels")
    axes[0].set_yticks(range(len(parents)), [f"parent {parent.index}" for parent in parents])
    axes[0].invert_yaxis()
    handles = [Patch(label=label, edgecolor="black", **_look_of(i)) for i, label in enumerate(_labels(parents))]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False)
    return figure


@_styled
def picks_figure(layer: LayerReport) -> Figure:
    """How often each parent comes first, and its share of all picks."""
    parents = most_used(layer)
    figure = _figure(max(4.5, 0.42 * len(parents) + 1.5), 2.8)
    axis = figure.subplots()
    places = np.arange(len(parents))
    first, picked = [p.share_first for p in parents], [p.share_picked for p in parents]
    axis.bar(places - 0.2, first, 0.4, label="comes first", color=COLOURS[0], edgecolor="black")
    label = f"share of all picks (K = {layer.top_k})"
    axis.bar(places + 0.2, picked, 0.4, label=label, color=COLOURS[5], edgecolor="black", hatch="//")
    axis.set_xticks(places, [str(parent.index) for parent in parents])
    axis.set_xlabel("parent")
    axis.set_ylabel("share of positions or picks")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


@_styled
def nmi_figure(report: MemoryReport) -> Figure:
    """Mutual information of parent and label by layer, beside an untrained memory's where there is one.

    Raises:
        ValueError: the report has no labels.
    """
    lines = {"documents": lambda layer: layer.nmi_documents, "positions": lambda layer: layer.nmi_positions}
    if all(line(layer) is None for layer in report.layers for line in lines.values()):
        raise ValueError("The memories were inspected without labels, so there is no information about them to draw.")
    figure = _figure(max(4.5, 0.5 * len(report.layers) + 1.5), 2.8)
    axis = figure.subplots()
    places = range(len(report.layers))
    for number, (unit, line) in enumerate(lines.items()):
        for memories, style, name in ((report, "-", unit), (report.untrained, ":", f"{unit}, untrained")):
            points = [line(layer) for layer in memories.layers] if memories else []
            values = [value for value in points if value is not None]
            if values and len(values) == len(points):
                axis.plot(places, values, style, marker=MARKERS[number], color=COLOURS[number], label=name)
    axis.set_xticks(places, [_layer_name(report, layer) for layer in report.layers])
    axis.set_ylim(0, 1)
    axis.set_xlabel("layer")
    axis.set_ylabel("normalised mutual information")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    write_bytes(files[0], drawn.getvalue())
    write_bytes(files[1], _svg(figure, stem.name).encode())
    return files


def inline_svg(figure: Figure, description: str, salt: str) -> str:
    """The figure as an ``<svg>`` element for a page: no declaration, metadata or names of other hosts.

    Args:
        description: what it shows, for those who cannot see it; plain text.
        salt: makes names inside it differ from those of other figures on the page.
    """
    svg = _svg(figure, salt)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = re.sub(r'\sid="[\w.]+_\d+"', "", svg)  # names of groups, the same in every figure and used by none
    opening, rest = svg.split(">", 1)
    return f"{opening} role='img' aria-label={quoteattr(description)}><title>{escape(description)}</title>{rest}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, salt: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def most_used(layer: LayerReport) -> Sequence[ParentReport]:
    """The parents that are drawn, by index."""
    used = sorted(layer.parents, key=lambda parent: (-parent.share_first, -parent.share_picked, parent.index))
    return sorted(used[:MAX_PARENTS], key=lambda parent: parent.index)


def _layer_name(report: MemoryReport, layer: LayerReport) -> str:
    """Its number; an encoder-decoder has each number twice."""
    twice = sum(other.index == layer.index for other in report.layers) > 1
    return f"{layer.index}\n{'dec' if 'decoder' in layer.name else 'enc'}" if twice else str(layer.index)


def _labels(parents: Sequence[ParentReport]) -> list[str]:
    return list(next(p.labels_positions or p.labels_documents or {} for p in parents))


def _look_of(number: int) -> dict[str, Any]:
    """Colour and hatch of a label; after all colours are used, each meets the next hatch."""
    hatch = HATCHES[(number + number // len(COLOURS)) % len(HATCHES)]
    return {"facecolor": COLOURS[number % len(COLOURS)], "hatch": hatch}


def _stacked_bars(axis: Any, labels: Sequence[str], rows: Sequence[Mapping[str, int]]) -> None:
    """A bar for each row, cut into the shares of its labels; how many there are stands at its end."""
    totals = [sum(row.values()) for row in rows]
    left = np.zeros(len(rows))
    for number, label in enumerate(labels):
        shares = np.array([row.get(label, 0) / max(1, total) for row, total in zip(rows, totals, strict=True)])
        bars = axis.barh(range(len(rows)), shares, 0.8, left, edgecolor="black", **_look_of(number))
        for bar, share in zip(bars, shares, strict=True):
            bar.set_visible(bool(share))  # an empty bar would still have its edge
        written = [f"{share:.0%}" if share >= _WRITTEN_FROM else "" for share in shares]
        for text in axis.bar_label(bars, written, label_type="center", fontsize=7):
            text.set_bbox(
                {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8} if text.get_text() else None
            )
        left += shares
    for place, total in enumerate(totals):
        axis.text(1.02, place, f"n = {total:,}", va="center", fontsize=7)
    axis.set_xlim(0, 1.22)
    axis.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines["bottom"].set_bounds(0, 1)
