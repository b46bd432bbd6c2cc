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
    classes: Annotated[
        bool, typer.Option("--classes", help="Instead, how a finished run recognises each class: scores, confusions.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of --classes: validation, test, ... [default: that of the run's score]"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show loss, learning rate and scores of a training by step.

    Example: `sparsepeft history out/topics --output curves.png`

    Example: `sparsepeft history out/topics --classes --output confusions.png`
    """
    from sparsepeft.errors import UserError
    from sparsepeft.runs.history import by_step, plot_history, read_history, score_names
    from sparsepeft_cli.terminal.console import out, print_json, table

    if classes:
        _show_classes(folder, part, output, json)
        return
    if part is not None:
        raise UserError(f"--part {part} goes with --classes; pass that, too, or leave it out.")
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


def _show_classes(folder: Path, part: str | None, output: Path | None, json: bool) -> None:
    from sparsepeft.runs.class_figures import plot_classes, read_report
    from sparsepeft_cli.evaluate import report_tables
    from sparsepeft_cli.terminal.console import out, print_json

    name, report = read_report(folder, part)
    if output is not None:
        plot_classes(report, output, f"{folder}, {name}")
    if json:
        print_json(report)
    elif output is not None:
        out.print(f"figure: {output}", highlight=False, soft_wrap=True)
    else:
        for shown in report_tables({name: report}):
            out.print(shown, highlight=False)


def _cell(key: str, value: Any) -> str:
    forms = {"step": "{:,}", "epoch": "{:.2f}", "learning_rate": "{:.2e}"}
    return "" if value is None else forms.get(key, "{:.4f}").format(value)
