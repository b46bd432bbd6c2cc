"""``sparsepeft history``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options

_ROWS = 20


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train`, also of one that goes on.")
    ],
    output: Annotated[Path | None, options.output("Draw a figure, .png or .svg; needs matplotlib.")] = None,
    json: options.Json = False,
) -> None:
    """Show loss, learning rate and scores of a training by step.

    Example: `sparsepeft history out/topics --output curves.png`
    """
    from sparsepeft.runs.history import by_step, plot_history, read_history, score_names
    from sparsepeft_cli.terminal.console import out, print_json, table

    history = read_history(folder)
    if output is not None:
        plot_history(history, output, str(folder))
    if json:
        print_json(history)
        return
    if output is not None:
        out.print(f"figure: {output}", highlight=False, soft_wrap=True)
        return
    rows = by_step(history)
    scores = score_names(history)
    columns = {"step": "step", "epoch": "epoch", "loss": "loss", "learning_rate": "lr"}
    if scores:
        columns |= {"eval_loss": "eval loss", **{f"eval_{name}": name for name in scores}}
    shown = [rows[index * (len(rows) - 1) // (_ROWS - 1)] for index in range(_ROWS)] if len(rows) > _ROWS else rows
    title = str(folder) + (f", {len(shown)} of {len(rows)} steps" if len(shown) < len(rows) else "")
    out.print(table(title, columns.values(), [[_cell(key, row.get(key)) for key in columns] for row in shown]))


def _cell(key: str, value: Any) -> str:
    forms = {"step": "{:,}", "epoch": "{:.2f}", "learning_rate": "{:.2e}"}
    return "" if value is None else forms.get(key, "{:.4f}").format(value)
