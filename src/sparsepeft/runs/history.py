"""What the history of a run shows: its losses and scores by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED, settle
from sparsepeft.plotting import COLOURS, write_figure
from sparsepeft.runs.files import HISTORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_SCORES = ("eval_loss", "eval_score")  # eval_score is one of the others, under a name that all tasks share


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's history, of the training that goes on in its folder if one does.

    Raises:
        UserError: the folder has none.
    """
    folder = Path(folder)
    settle(folder)
    for path in (folder / UNFINISHED / HISTORY, folder / HISTORY):
        if lines := read_lines(path):
            return lines
    raise UserError(f"{folder} holds no history of a training ({HISTORY}); pass the output folder of a run.")


def by_step(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step that has lines: what they hold together."""
    rows: dict[int, dict[str, Any]] = {}
    for line in history:
        rows.setdefault(line["step"], {}).update(line)
    return [rows[step] for step in sorted(rows)]


def score_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics, without ``eval_``."""
    names = dict.fromkeys(key for line in history for key in line if key.startswith("eval_") and key not in _NO_SCORES)
    return [name.removeprefix("eval_") for name in names]


def plot_history(history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw losses, and scores where there are any, by step.

    Args:
        history: as from :func:`read_history`.
        path: of the figure; its suffix is the format, such as .png or .svg.
        title: above the figure.

    Raises:
        UserError: matplotlib is not installed, or it does not know the format.
    """
    write_figure(lambda: _draw(history, title), Path(path))


def _draw(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    from matplotlib.figure import Figure

    scores = {name: f"eval_{name}" for name in score_names(history)}
    losses = {"training": "loss", "selection": "eval_loss"}
    panels = [("loss", losses), *([("score", scores)] if scores else [])]
    figure = Figure(figsize=(6.4, 1 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for (name, key), colour in zip(curves.items(), COLOURS, strict=False):
            points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="." if len(points) < 40 else "")
        axis.set_ylabel(label)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[0].set_title(title, loc="left")
    return figure


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file, without one that a killed process or a full disk has cut short."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "seconds"} <= line.keys():
            lines.append(line)
    return lines
