"""``sparsepeft compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options
from sparsepeft_cli.train import OPTIONS

_SHARED = (
    *("train_file", "validation_file", "test_file", "text_column", "text_pair_column", "label_column", "problem_type"),
    *("delimiter", "encoding", "data_dir", "max_train_samples", "max_length", "model", "epochs", "max_steps"),
    *("class_weights", "thresholds", "precision", "device"),
)


def command(
    task: Annotated[str | None, typer.Option(help="Instead of own files: a GLUE task, bbc-news or topics.")] = None,
    methods: Annotated[
        list[str] | None, options.names("--methods", "What to compare", "head, spartan, pfeiffer, lora, full")
    ] = None,
    seeds: Annotated[list[str] | None, options.numbers("--seeds", "Train each method with these seeds", "42")] = None,
    output_dir: Annotated[
        Path | None, options.output_dir("Folder for the runs and the result. [default: out/compare-NAME]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs there that have other values.")] = False,
    json: options.Json = False,
    **shared: Any,
) -> None:
    """Compare methods on your data: score, training time, bytes and speed, in one table.

    Trains each by its best recipe, scores all on the same rows, says which differences are noise, and recommends one.
    Runs that are done are not repeated: the same command goes on after an interruption.

    Example: `sparsepeft compare --train-file mine.csv`

    Example: `sparsepeft compare --task topics --methods head,spartan,lora --seeds 1,2,3`
    """
    from sparsepeft.comparison.names import COMPARED, check_names
    from sparsepeft.errors import RunFailed, UserError
    from sparsepeft.training.early import check_early

    chosen, flags = check_names(task, options.several(methods) or COMPARED), {"task": task, **shared}
    train_file = shared["train_file"]
    if task is None and train_file is None:
        raise UserError("Pass your own file as --train-file, or --task with a task's name.")
    check_early(flags, None, overwrite)
    name = train_file.name.partition(".")[0] if train_file else task
    flags["output_dir"] = output_dir or Path("out") / f"compare-{name}"
    from sparsepeft.comparison import compare
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.training import load_config
    from sparsepeft_cli.terminal.console import out, print_json, table
    from sparsepeft_cli.terminal.errors import in_options
    from sparsepeft_cli.terminal.matrix_progress import MatrixProgress

    keep_freed_memory()
    with MatrixProgress() as progress:
        comparison = compare(
            load_config(flags), chosen, options.whole_numbers("--seeds", seeds), watcher=progress, overwrite=overwrite
        )
    if json:
        print_json(comparison.to_dict())
    else:
        out.print(table(comparison.heading, *comparison.cells()))
        for note in (*comparison.explanations(), *comparison.notes):
            out.print(f"note: {in_options(note)}", highlight=False, soft_wrap=True)
        out.print(f"written: {', '.join(map(str, comparison.files))}", highlight=False, soft_wrap=True)
        out.print(comparison.recommendation, style="bold", highlight=False, soft_wrap=True)
    if comparison.failed:
        raise RunFailed(
            f"{len(comparison.failed)} of {len(chosen)} methods failed: {', '.join(comparison.failed)}. The same "
            "command tries them again."
        )


for _title, _section in OPTIONS.items():
    if _taken := {name: each for name, each in _section.items() if name in _SHARED}:
        options.declare(command, options.section(_title, _taken))
