"""How well each class of a finished run is recognised, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.plotting import COLOURS, MARKERS, write_figure
from sparsepeft.runs.files import read_results, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CONFUSIONS, MOST_BARS = 40, 60  # classes that can be told apart in a figure
_MOST_COUNTS = 20  # with so many classes, the cells have room for their counts
_WIDEST = 24  # characters of a class's name


def read_report(folder: str | Path, part: str | None = None) -> tuple[str, dict[str, Any]]:
    """Scores by class of a finished run, from its results.

    Args:
        folder: of the run.
        part: that was scored; None is the one that the run's score is about.

    Returns:
        The part's name, and what :func:`sparsepeft.tasks.metrics.report` gives: ``per_class``, a mapping from each name
        to ``precision``, ``recall``, ``f1`` and ``support``, and for single labels ``confusion_matrix``.

    Raises:
        UserError: the folder holds no finished run, it has no classes, or no such part was scored.
    """
    folder = Path(folder)
    read_run(folder)  # says what is wrong with the folder
    results = read_results(folder)
    own: Any = results.get("score_split")
    reports = results.get("reports") or {own: results.get("report") or {}}  # earlier versions had one part's alone
    name = own if part is None else part
    if name not in reports:
        raise UserError(unknown_name("`part`:", str(name), reports))
    if "per_class" not in reports[name]:
        raise UserError(f"The run in {folder} has no classes to draw; pass one that labels texts.")
    return name, reports[name]


def plot_classes(report: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """Draw the confusion matrix, or where there is none the scores of each class.

    Of more than 40 classes the matrix has those with the most mistakes, of more than 60 the bars have those with the
    lowest F1; the title says so.

    Args:
        report: as from :func:`read_report`.
        path: of the figure; its suffix is the format, such as .png or .svg.
        title: above the figure.

    Raises:
        UserError: matplotlib is not installed, or it does not know the format.
    """
    names, matrix = list(report["per_class"]), report.get("confusion_matrix")
    if matrix is not None:
        write_figure(lambda: _confusions(names, np.asarray(matrix), title), Path(path))
    else:
        write_figure(lambda: _bars(report["per_class"], title), Path(path))


def _confusions(names: Sequence[str], counts: np.ndarray, title: str) -> Figure:
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    kept = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CONFUSIONS])
    shares = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[np.ix_(kept, kept)]
    counts, labels = counts[np.ix_(kept, kept)], [_short(names[index]) for index in kept]
    side = 2.2 + max(0.24 * len(kept), 2.4)
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(kept) <= _MOST_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
    _name_ticks(axis.xaxis, labels, rotation=90)
    _name_ticks(axis.yaxis, labels)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    rest = f"{len(kept)} of {len(names)} classes, those with the most mistakes" if len(kept) < len(names) else ""
    _set_title(axis, title, rest)
    return figure


def _bars(per_class: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    ordered = sorted(per_class.items(), key=lambda one: one[1]["f1"])
    shown = ordered[:MOST_BARS]
    places = range(len(shown))
    figure = _figure(6.4, 1.2 + 0.2 * len(shown))
    axis = figure.subplots()
    axis.barh(places, [values["f1"] for _, values in shown], 0.7, color=COLOURS[4], label="F1")
    for number, key in enumerate(("precision", "recall")):
        look: dict[str, Any] = {"marker": MARKERS[number], "color": COLOURS[number], "linestyle": "", "markersize": 3}
        axis.plot([values[key] for _, values in shown], places, label=key, **look)
    for place, (_, values) in zip(places, shown, strict=True):
        axis.text(1.02, place, f"of {values['support']:,}", va="center", fontsize=7)
    _name_ticks(axis.yaxis, [_short(name) for name, _ in shown])
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    rest = f"{len(shown)} of {len(ordered)} classes, those with the lowest F1" if len(shown) < len(ordered) else ""
    _set_title(axis, title, rest)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _name_ticks(axis: Any, labels: Sequence[str], **options: Any) -> None:
    # A "$" in a name is a dollar sign.
    axis.set_ticks(range(len(labels)), labels, fontsize=7, parse_math=False, **options)


def _set_title(axis: Any, *lines: str) -> None:
    axis.set_title("\n".join(line for line in lines if line), loc="left", fontsize=9, parse_math=False)


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST else name[: _WIDEST - 1] + "…"
