"""``sparsepeft predict --input``: files of any size, any number of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_cli.terminal.options import short_dtype

# Of `sparsepeft predict`, where files are answered into a folder.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "input": (
        list[str],
        "Files to answer, each into a file of the same name and format in the folder --output: CSV, TSV, JSONL, also "
        "with .gz, or parquet. A pattern in quotes, 'texts/*.parquet'; may be repeated.",
        {"metavar": "FILES"},
    ),
    "task": (list[str], "A task and its folder, instead of FOLDER; may be repeated.", {"metavar": "NAME=FOLDER"}),
    "tasks_dir": (Path, "Every task in this folder.", {"metavar": "DIR"}),
    "dtype": (
        str,
        "Of the backbone: fp32, bf16 or fp16. [default: fp32]",
        {"metavar": "DTYPE", "callback": lambda value: value and short_dtype(value)},
    ),
    "token_budget": (int, "Tokens of a batch, padding included. [default: 4096]", {"min": 1}),
    "threads": (int, "CPU threads, of each worker with --ray. [default: PyTorch's; 1 with --ray]", {"min": 1}),
    "ray": (bool, "Answer in the workers of a Ray cluster, one on this machine without --address."),
    "address": (
        str,
        "A running Ray cluster, such as HOST:6379, or auto. [default: one started here]",
        {"metavar": "ADDRESS"},
    ),
    "workers": (int, "How many, with --ray. [default: one for each processor]", {"min": 1}),
    "overwrite": (bool, "Remove the former answers in the folder --output first."),
    "json": (bool, "Print what was done as JSON."),
}


def check_goes_with_input(bulk: dict[str, Any]) -> None:
    """Refuse options of this kind of answering without --input.

    Raises:
        UserError: there is one.
    """
    from sparsepeft.errors import UserError

    if given := [name for name, value in bulk.items() if value]:
        raise UserError(f"`{given[0]}` goes with --input, which answers files into a folder; pass both or neither.")


def score(folder: Path | None, output: Path | None, rows: dict[str, Any], bulk: dict[str, Any], **others: Any) -> None:
    """Answer files, and say what was done.

    Args:
        folder: of the only task, unless tasks are named.
        output: the folder for the answers.
        rows: columns, delimiter and encoding.
        bulk: the options of this kind of answering, by name.
        **others: options that both kinds of answering have.
    """
    from sparsepeft.errors import RunFailed, UserError

    named, tasks_dir = bulk.pop("task") or [], bulk.pop("tasks_dir")
    if (folder is None) == (not named and tasks_dir is None):
        raise UserError("Pass either FOLDER or tasks by --task and --tasks-dir.")
    if output is None:
        raise UserError("--input was given without --output; pass a folder for the answers.")
    use_ray, address, workers = bulk.pop("ray"), bulk.pop("address"), bulk.pop("workers")
    if not use_ray and (address or workers):
        raise UserError(f"{'--address' if address else '--workers'} goes with --ray; pass both or neither.")
    from sparsepeft.bulk import RayOptions, score_files
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.inference.folders import named_tasks
    from sparsepeft.scoring import TableOptions
    from sparsepeft_cli.terminal.bulk_progress import BulkProgress
    from sparsepeft_cli.terminal.console import kept_from_stdout, print_json, say

    keep_freed_memory()
    inputs, as_json, overwrite = bulk.pop("input"), bulk.pop("json"), bool(bulk.pop("overwrite"))
    tasks = named_tasks(named, tasks_dir) if folder is None else {folder.resolve().name: folder}
    given = {name: value for name, value in (bulk | others).items() if value is not None}
    try:
        with kept_from_stdout(), BulkProgress() as progress:
            report = score_files(
                inputs,
                output,
                tasks,
                table=TableOptions(**rows),
                ray=RayOptions(address, workers) if use_ray else None,
                overwrite=overwrite,
                progress=progress.show,
                **given,
            )
    except (UserError, RunFailed) as error:
        error.args = (str(error).replace("`output_dir`", "`output`"),)  # the command's name for it
        raise
    if as_json:
        print_json(report.to_dict())
    say(
        f"{report.rows:,} rows in {report.seconds:.1f} s ({report.rows_per_second:,.0f} a second): {report.files:,} "
        f"files written to {output}, {report.skipped:,} were there"
    )
    if report.truncated:
        say(f"note: {report.truncated:,} of {report.rows:,} rows are longer than training's and were cut.")
    for name, reason in report.failed_files.items():
        say(f"{name} was not answered: {reason}")
    if report.failed or report.failed_files:
        raise RunFailed(
            f"{report.failed:,} of {report.rows:,} rows could not be answered; the error in them says why."
            if not report.failed_files
            else f"{len(report.failed_files)} files could not be read, and {report.failed:,} rows not be answered."
        )
