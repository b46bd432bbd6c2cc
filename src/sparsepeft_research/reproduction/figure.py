"""A table's figure: mean score against trained bytes per task. Needs the extra ``plots`` (matplotlib)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from sparsepeft.plotting import COLOURS, MARKERS, require_matplotlib, write_drawing
from sparsepeft_research.reproduction.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_figure(table: Table) -> Figure:
    """One point per method, with the standard deviation over seeds where there is one.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(table.rows):
        if row.average is None:
            continue
        size = statistics.mean(row.saved_bytes[task] for task in table.common_tasks)
        axes.errorbar(
            size,
            row.average.mean,
            yerr=row.average.std,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=8,
            capsize=3,
        )
        axes.annotate(row.method, (size, row.average.mean), xytext=(8, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("bytes written per task (mean, logarithmic)")
    axes.set_ylabel(f"mean score of {len(table.common_tasks)} tasks x 100")
    axes.set_title(f"{table.title.partition(':')[0]}, {table.model}", loc="left", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def write_figure(table: Table, path: Path) -> list[Path]:
    """Write the figure as PNG and SVG.

    Args:
        table: what to show.
        path: without suffix.

    Returns:
        The files written.

    Raises:
        UserError: matplotlib is not installed.
    """
    return write_drawing(lambda: score_figure(table), path)
