"""``sparsepeft evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Output folder of `sparsepeft train`.")],
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SPARSEPEFT_DATA", help="Folder with the tasks' files.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, if it has moved since training.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Score a trained run on its task's validation and test parts.

    Example: `sparsepeft evaluate out/topics`
    """
    from sparsepeft.allocator import keep_freed_memory
    from sparsepeft.training import evaluate
    from sparsepeft_cli._console import err, out, print_json, table

    keep_freed_memory()
    with err.status("evaluating"):
        metrics = evaluate(folder, str(data_dir) if data_dir else None, model)
    if json:
        print_json(metrics)
        return
    names = list(next(iter(metrics.values())))
    rows = [[part, *(f"{values[name]:.4f}" for name in names)] for part, values in metrics.items()]
    out.print(table(str(folder), ["part", *names], rows))
