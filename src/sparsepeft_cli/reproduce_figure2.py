"""``sparsepeft reproduce figure2``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsepeft_cli.terminal import options


def command(
    data_dir: options.DataDir = None,
    model: options.Model = None,
    output_dir: Annotated[Path, options.output_dir("Folder for the run, the figure and the page.")] = Path(
        "outputs/reproduce/figure2"
    ),
    epochs: Annotated[float, typer.Option(help="Passes over the training part.")] = 10,
    top_k: Annotated[int, typer.Option(min=1, help="Parents kept per position; the paper does not give it.")] = 2,
    anneal: Annotated[
        bool,
        typer.Option("--anneal/--no-anneal", help="Let K fall from 5 to --top-k over the first half of the training."),
    ] = True,
    max_length: Annotated[int | None, typer.Option(help="Cut texts to this many tokens.")] = None,
    precision: options.Precision = "fp32",
    seed: options.Seed = 42,
    recipe: options.Recipe = "paper",
    set_: Annotated[list[str] | None, options.settings("A further setting of the memory")] = None,
    json: options.Json = False,
) -> None:
    """Train 5 parents with 1 child each on BBC News and show which topics pick each in the last layer.

    A finished training is not repeated and an interrupted one goes on.

    Example: `sparsepeft reproduce figure2 --data-dir DATA --max-length 128 --precision bf16`
    """
    from sparsepeft.training import parse_settings
    from sparsepeft_cli.inspect import report_tables
    from sparsepeft_cli.terminal.console import out, print_json
    from sparsepeft_cli.terminal.progress import TrainingProgress
    from sparsepeft_research.reproduction.figure2 import reproduce_figure2

    settings = parse_settings(set_ or [])
    with TrainingProgress() as progress:
        report = reproduce_figure2(
            output_dir,
            top_k=top_k,
            anneal=anneal,
            epochs=epochs,
            recipe=recipe,
            settings=settings,
            callbacks=progress.callbacks,
            announce=progress.announce,
            data_dir=str(data_dir) if data_dir else None,
            model=model,
            max_length=max_length,
            precision=precision,
            seed=seed,
        )
    if json:
        print_json(report.to_dict())
        return
    for part in report_tables(report):
        out.print(part, highlight=False)
    out.print(f"figure: {output_dir / 'figure2.png'}\npage: {output_dir / 'inspection.html'}", highlight=False)
