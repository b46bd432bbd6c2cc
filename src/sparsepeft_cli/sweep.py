"""``sparsepeft sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options

# Fields of ``sparsepeft.sweeps.SweepOptions``.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_samples": (int, "Draws for each combination of the file's grids. [default: 1]"),
    "seed": (int, "Seed of the draws; that of the runs is a value of the file. [default: 0]"),
    "asha": (
        bool,
        "Stop trials early whose scores are behind those of the same task. [default: asha]",
        {"flag": "--asha/--no-asha"},
    ),
    "grace_period": (float, "Share of its steps that every trial does. [default: 0.1]"),
    "reduction_factor": (float, "Of so many trials one goes on, to so many times the steps. [default: 3]"),
    "max_concurrent": (int, "Trials at once. [default: as many as there is room for]"),
    "cpus_per_trial": (int, "CPUs, and threads, of a trial. [default: 1]"),
    "gpus_per_trial": (float, "GPUs of a trial, such as 1 or 0.5. [default: 0]"),
    "max_failures": (int, "Start a trial again whose worker died, so many times. [default: 3]"),
}


def command(
    space: Annotated[
        Path,
        typer.Option("--space", metavar="FILE", help="A config of `sparsepeft train` whose values may be searches."),
    ],
    output_dir: Annotated[
        Path | None, options.output_dir("Folder for the trials and the result. [default: out/sweep-NAME]")
    ] = None,
    address: options.Address = None,
    data_dir: options.DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs there that have other values.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials; run and write nothing.")] = False,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Search values of training runs for one task or many, on Ray Tune; rank the trials of each task.

    Trials are scored on a tenth of the training data. The same command goes on after an interruption.

    Example: `sparsepeft sweep --space sweep.yaml --num-samples 20`

    Example: `sparsepeft sweep --space sweep.yaml --address HOST:6379 --gpus-per-trial 1`
    """
    from sparsepeft.extras import require
    from sparsepeft.sweeps import SweepOptions, plan_sweep, read_space, sweep

    searched = read_space(space, data_dir)
    folder = output_dir or Path("out") / f"sweep-{space.name.partition('.')[0]}"
    how = SweepOptions(**{name: value for name, value in given.items() if value is not None})
    if dry_run:
        _show_plan(plan_sweep(searched, folder, how, overwrite), json)
        return
    require("ray.tune", "ray", "`sparsepeft sweep`")
    from sparsepeft.errors import RunFailed
    from sparsepeft_cli.terminal.console import kept_from_stdout, out, print_json, program, table
    from sparsepeft_cli.terminal.matrix_progress import MatrixProgress

    with kept_from_stdout(), MatrixProgress() as progress:
        result = sweep(searched, folder, how, address=address, watcher=progress, overwrite=overwrite)
    if json:
        print_json(result.content)
    else:
        out.print(table("", *result.cells()))
        out.print(f"written: {result.file}", highlight=False, soft_wrap=True)
        for config in result.configs.values():
            out.print(f"train the best: {program()} train --config {config}", highlight=False, soft_wrap=True)
    if result.failed:
        raise RunFailed(
            f"{len(result.failed)} of {len(result.trials)} trials failed ({', '.join(result.failed)}); NAME.error.json "
            f"in {folder} says why. The same command tries them again."
        )


options.declare(command, options.section("How", _OPTIONS))


def _show_plan(plan: list[Any], json: bool) -> None:
    from sparsepeft_cli.terminal.console import out, print_json, table

    if json:
        print_json([standing.to_dict() for standing in plan])
    else:
        out.print(table("", ("trial", "state"), [(each.trial.name, each.state) for each in plan]))
        out.print(f"{len(plan)} trials", highlight=False)
