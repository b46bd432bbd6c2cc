"""The benchmark's figure: throughput of every candidate, a panel for each plan. Needs the extra ``plots``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.plotting import COLOURS, require_matplotlib, write_drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR_INCHES, _PANEL_INCHES = 0.22, 0.7


def throughput_figure(report: dict[str, Any]) -> Figure:
    """Bars of inputs per minute, with the quartiles of the passes; a colour for each precision.

    Args:
        report: the content of a result file.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    results = report["results"]
    heights = [_BAR_INCHES * len(one["candidates"]) + _PANEL_INCHES for one in results]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = dict(zip(report["settings"]["precisions"], COLOURS, strict=False))
    for axes, one in zip(panels, results, strict=True):
        for place, (name, found) in enumerate(one["candidates"].items()):
            rate, timing = found["inputs_per_minute"], found["timing"]
            slow, fast = (rate * timing["median_ms"] / timing[f"{which}_quartile_ms"] for which in ("third", "first"))
            axes.barh(place, rate, xerr=[[rate - slow], [fast - rate]], color=colours[name.split()[-1]], capsize=2)
        axes.set_yticks(range(len(one["candidates"])), list(one["candidates"]))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_title(f"{one['group']}: {one['plan']}", loc="left", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"inputs per minute, {report['settings']['model']}, {report['settings']['threads']} threads")
    return figure


def write_figure(report: dict[str, Any], path: Path) -> list[Path]:
    """Write the figure as PNG and SVG; ``path`` is without suffix.

    Raises:
        UserError: matplotlib is not installed.
    """
    return write_drawing(lambda: throughput_figure(report), path)
