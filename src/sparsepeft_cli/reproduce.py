"""``sparsepeft reproduce``: the paper's tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli import reproduce_figure2
from sparsepeft_cli.terminal import options
from sparsepeft_cli.terminal.errors import Command
from sparsepeft_cli.terminal.help import PlainGroup

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    help="The paper's tables and figures from runs made here.\n\nExample: `sparsepeft reproduce table2 --dry-run`",
)

_GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
_METHODS = ("full", "pfeiffer", "houlsby", "spartan")
_PROTOCOLS = {"table1": "full-data", "table2": "few-shot", "table3": "few-shot"}
_TITLES = {
    "table1": "Table 1: storage, device speed and GLUE scores, trained on all data.",
    "table2": "Table 2: storage, fine-tuning speed and mean GLUE score, trained on 200 examples.",
    "table3": "Table 3: the same runs as table 2, task by task.",
}

Tasks = Annotated[list[str] | None, options.names("--tasks", "Some tasks", "the nine of GLUE")]
Methods = Annotated[list[str] | None, options.names("--methods", "Some methods", "full, pfeiffer, houlsby, spartan")]
Seeds = Annotated[list[str] | None, options.numbers("--seeds", "Seeds", "42, 43, 44")]
MaxTrainSamples = Annotated[int | None, typer.Option(help="Use at most this many training examples (table 1).")]
MaxEpochs = Annotated[float | None, typer.Option(help="Train for at most this many epochs (table 1).")]
MaxSteps = Annotated[int | None, typer.Option(help="Train for this many steps. [default: the protocol's]")]
FewShot = Annotated[int | None, typer.Option(help="Training examples per task (tables 2, 3). [default: 200]")]
Settings = Annotated[list[str] | None, options.settings("Another value of every run, such as max_length=128")]
OutputDir = Annotated[Path | None, options.output_dir("Folder of the results. [default: outputs/reproduce/PROTOCOL]")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List what is left and how long it may take, by a few steps; write nothing.")
]
Grid = Annotated[
    bool, typer.Option("--grid", help="Search learning rate, sizes and epochs first, as the paper did (appendix A).")
]
TableOnly = Annotated[bool, typer.Option("--table-only", help="Write the table of the results there are; run nothing.")]
KeepWeights = Annotated[bool, typer.Option("--keep-weights", help="Leave trained weights in OUTPUT_DIR/work.")]
DeviceThroughput = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Table 1: a file of `sparsepeft benchmark inference --emulate DEVICE`; may be repeated.",
    ),
]


def _command(table: str) -> Callable[..., None]:
    def command(
        data_dir: options.DataDir = None,
        model: options.Model = None,
        tasks: Tasks = None,
        methods: Methods = None,
        seeds: Seeds = None,
        max_train_samples: MaxTrainSamples = None,
        max_epochs: MaxEpochs = None,
        max_steps: MaxSteps = None,
        few_shot: FewShot = None,
        precision: options.Precision = "fp32",
        recipe: options.Recipe = "paper",
        set_: Settings = None,
        output_dir: OutputDir = None,
        grid: Grid = False,
        dry_run: DryRun = False,
        table_only: TableOnly = False,
        keep_weights: KeepWeights = False,
        device_throughput: DeviceThroughput = None,
        json: options.Json = False,
    ) -> None:
        from sparsepeft.errors import UserError

        values = {
            "data_dir": str(data_dir) if data_dir else None,
            "model": model,
            "max_train_samples": max_train_samples,
            "max_steps": max_steps,
            "precision": precision,
            "recipe": recipe,
        }
        if device_throughput and table != "table1":
            raise UserError(f"--device-throughput was given, but {table} has no devices; use table1.")
        folder = output_dir or Path("outputs/reproduce") / (_PROTOCOLS[table] + ("-grid" if grid else ""))
        matrix = _matrix(table, tasks, methods, seeds, few_shot, max_epochs, folder, values, set_)
        if dry_run:
            _show_plan(matrix, grid, json)
        else:
            how = {"grid": grid, "run": not table_only, "keep_weights": keep_weights}
            _show_table(table, matrix, how | {"device_files": device_throughput or ()}, json)

    command.__doc__ = f"""{_TITLES[table]}

    A run that is done is not repeated: the same command goes on after an interruption, also in several processes.

    Example: `sparsepeft reproduce {table} --data-dir DATA --tasks cola,rte --dry-run`
    """
    return command


for _table in _PROTOCOLS:
    app.command(_table, cls=Command)(_command(_table))
app.command("figure2", cls=Command)(reproduce_figure2.command)


def _matrix(
    table: str,
    tasks: list[str] | None,
    methods: list[str] | None,
    seeds: list[str] | None,
    few_shot: int | None,
    max_epochs: float | None,
    output_dir: Path,
    values: dict[str, Any],
    settings: list[str] | None,
) -> Any:
    import dataclasses

    from sparsepeft.errors import UserError
    from sparsepeft.training import RunConfig, parse_settings
    from sparsepeft_research.reproduction import Matrix
    from sparsepeft_research.reproduction.matrix import SEEDS
    from sparsepeft_research.reproduction.protocols import FEW_SHOT_EXAMPLES

    protocol = _PROTOCOLS[table]
    if few_shot is not None and protocol != "few-shot":
        raise UserError(f"--few-shot {few_shot} was given, but {table} trains on all data; use table2 or table3.")
    fields = {f.name for f in dataclasses.fields(RunConfig)}
    further = parse_settings(settings or [])
    values |= {key: value for key, value in further.items() if key in fields}
    values["settings"] = {key: value for key, value in further.items() if key not in fields}
    return Matrix(
        tasks=options.several(tasks) or _GLUE,
        methods=options.several(methods) or _METHODS,
        output_dir=output_dir,
        protocol=protocol,
        seeds=options.whole_numbers("--seeds", seeds) or SEEDS,
        num_examples=few_shot or FEW_SHOT_EXAMPLES,
        max_epochs=max_epochs,
        values=values,
    )


def _show_table(name: str, matrix: Any, how: dict[str, Any], json: bool) -> None:
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.errors import RunFailed
    from sparsepeft_cli.terminal.console import out, print_json, table
    from sparsepeft_cli.terminal.matrix_progress import MatrixProgress
    from sparsepeft_research.reproduction import reproduce
    from sparsepeft_research.reproduction.render import cells

    keep_freed_memory()
    with MatrixProgress() as progress:
        outcome = reproduce(name, matrix, watcher=progress, **how)
    if json:
        print_json(outcome.table.to_dict())
    elif outcome.table.rows:
        names, methods = cells(outcome.table)
        # A column for each method: a row for each would be too wide for most terminals.
        header, *rows = zip(names, *methods, strict=True)
        out.print(f"{outcome.table.title}\n{outcome.table.model}, scores x 100", highlight=False)
        out.print(table("", header, rows))
        for note in outcome.table.notes:
            out.print(f"- {note}", highlight=False, markup=False)
        out.print(f"written: {', '.join(map(str, outcome.files))}", highlight=False, soft_wrap=True)
    else:
        out.print(f"There is no result in {matrix.output_dir} yet.", highlight=False)
    if outcome.failures:
        raise RunFailed(
            f"{len(outcome.failures)} runs failed ({', '.join(outcome.failures)}); NAME.error.json in "
            f"{matrix.output_dir} says why. The same command tries them again."
        )


def _show_plan(matrix: Any, grid: bool, json: bool) -> None:
    from sparsepeft_cli.terminal.console import err, out, print_json
    from sparsepeft_research.reproduction import plan_of

    with err.status("checking names and data") as status:
        planned = plan_of(matrix, grid, measure=True, progress=status.update)
    if json:
        shown = ("state", "detail", "seconds", "estimate")
        print_json([{"name": p.run.name} | {key: getattr(p, key) for key in shown} for p in planned])
        return
    for part in _plan_parts(planned):
        out.print(part, highlight=False)
    if grid:
        out.print("The runs with the chosen values follow the grid's.", highlight=False)


def _plan_parts(planned: list[Any]) -> list[Any]:
    from sparsepeft_cli.terminal.console import table
    from sparsepeft_cli.terminal.summary import duration

    rows = []
    for p in planned:
        time = "unknown" if p.seconds is None else duration(p.seconds)
        rows.append([p.run.name, p.state, time, f"{p.result['score']:.4f}" if p.result else ""])
    left = [p for p in planned if p.state != "done"]
    line = f"{len(planned) - len(left)} of {len(planned)} runs are done"
    if known := [p.seconds for p in left if p.seconds is not None]:
        others = "the others" if len(known) == len(left) else f"{len(known)} of the others"
        kinds = ", ".join(
            f"{name} ({count})" for name, count in Counter(p.estimate for p in left if p.estimate).items()
        )
        line += f"; {others} may take {duration(sum(known))} in one process, by {kinds}"
    details = [f"{p.run.name}: {p.state}: {p.detail}" for p in planned if p.detail]
    return [table("", ["run", "state", "time", "score"], rows), *details, f"{line}."]
