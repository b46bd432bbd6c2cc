"""``sparsepeft reproduce``: the paper's tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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
_PLAN = "List what is left and how long it may take, by a few steps; write nothing."
_FOLDER = "Folder of the results. [default: outputs/reproduce/PROTOCOL]"
_SET = "Another value of every run, such as max_length=128, or of one method's: lora.learning_rate=5e-4"
_DEVICE_FILE = "Table 1: a file of `sparsepeft benchmark inference --emulate DEVICE`; may be repeated."


def _option(kind: Any, help: str, *flag: str) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*flag, help=help)], False if kind is bool else None


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "data_dir": (options.DataDir, None),
    "model": (options.Model, None),
    "tasks": (Annotated[list[str] | None, options.names("--tasks", "Some tasks", "the nine of GLUE")], None),
    "methods": (Annotated[list[str] | None, options.names("--methods", "Some methods", ", ".join(_METHODS))], None),
    "seeds": (Annotated[list[str] | None, options.numbers("--seeds", "Seeds", "42, 43, 44")], None),
    "max_train_samples": _option(int | None, "Use at most this many training examples (table 1)."),
    "max_epochs": _option(float | None, "Train for at most this many epochs (table 1)."),
    "max_steps": _option(int | None, "Train for this many steps. [default: the protocol's]"),
    "few_shot": _option(int | None, "Training examples per task (tables 2, 3). [default: 200]"),
    "precision": (options.Precision, "fp32"),
    "recipe": (options.Recipe, "paper"),
    "set_": (Annotated[list[str] | None, options.settings(_SET)], None),
    "output_dir": (Annotated[Path | None, options.output_dir(_FOLDER)], None),
    "grid": _option(bool, "Search learning rate, sizes and epochs first, as the paper did (appendix A).", "--grid"),
    "dry_run": _option(bool, _PLAN, "--dry-run"),
    "table_only": _option(bool, "Write the table of the results there are; run nothing.", "--table-only"),
    "keep_weights": _option(bool, "Leave trained weights in OUTPUT_DIR/work.", "--keep-weights"),
    "ray": _option(bool, "Do several runs at once, on a Ray cluster.", "--ray"),
    "address": (options.Address, None),
    "cpus_per_run": _option(int | None, "With --ray: CPUs, and threads, of a run. [default: 1]"),
    "gpus_per_run": _option(float | None, "With --ray: GPUs of a run. [default: 0]"),
    "device_throughput": _option(list[Path] | None, _DEVICE_FILE),
    "json": (options.Json, False),
}


def _command(table: str) -> Callable[..., None]:
    def command(**given: Any) -> None:
        from sparsepeft.errors import UserError

        files, grid = given["device_throughput"] or (), given["grid"]
        if files and table != "table1":
            raise UserError(f"--device-throughput was given, but {table} has no devices; use table1.")
        folder = given["output_dir"] or Path("outputs/reproduce") / (_PROTOCOLS[table] + ("-grid" if grid else ""))
        matrix = _matrix(table, folder, given)
        if given["dry_run"]:
            _show_plan(matrix, grid, given["json"])
        else:
            how = {"grid": grid, "run": not given["table_only"], "keep_weights": given["keep_weights"]}
            how["cluster"] = _cluster(given)
            _show_table(table, matrix, how | {"device_files": files}, given["json"])

    options.declare(command, _OPTIONS)
    command.__doc__ = f"""{_TITLES[table]}

    A run that is done is not repeated: the same command goes on after an interruption, also in several processes.

    Example: `sparsepeft reproduce {table} --data-dir DATA --tasks cola,rte --dry-run`
    """
    return command


for _table in _PROTOCOLS:
    app.command(_table, cls=Command)(_command(_table))


def _cluster(given: dict[str, Any]) -> Any:
    from sparsepeft.errors import UserError
    from sparsepeft_research.reproduction import Cluster

    values = {name: given[name] for name in ("address", "cpus_per_run", "gpus_per_run") if given[name] is not None}
    if values and not given["ray"]:
        raise UserError(f"`{next(iter(values))}` was given without `ray`; pass `ray` as well.")
    return Cluster(**values) if given["ray"] else None


def _matrix(table: str, folder: Path, given: dict[str, Any]) -> Any:
    from sparsepeft.errors import UserError
    from sparsepeft.training import parse_settings
    from sparsepeft_research.reproduction import Matrix
    from sparsepeft_research.reproduction.matrix import SEEDS
    from sparsepeft_research.reproduction.protocols import FEW_SHOT_EXAMPLES

    few_shot, protocol = given["few_shot"], _PROTOCOLS[table]
    if few_shot is not None and protocol != "few-shot":
        raise UserError(f"--few-shot {few_shot} was given, but {table} trains on all data; use table2 or table3.")
    further, by_method = _values_of(parse_settings(given["set_"] or []))
    values = {name: given[name] for name in ("model", "max_train_samples", "max_steps", "precision", "recipe")}
    values["data_dir"] = str(given["data_dir"]) if given["data_dir"] else None
    values |= further
    return Matrix(
        tasks=options.several(given["tasks"]) or _GLUE,
        methods=options.several(given["methods"]) or _METHODS,
        output_dir=folder,
        protocol=protocol,
        seeds=options.whole_numbers("--seeds", given["seeds"]) or SEEDS,
        num_examples=few_shot or FEW_SHOT_EXAMPLES,
        max_epochs=given["max_epochs"],
        values=values,
        method_values=by_method,
    )


def _values_of(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields of every run's config, and of the runs of one method, whose keys begin with its name and a dot."""
    import dataclasses

    from sparsepeft.methods.recipes import METHODS
    from sparsepeft.training import RunConfig

    fields = {f.name for f in dataclasses.fields(RunConfig)}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        method, dot, own = key.partition(".")
        method, name = (method, own) if dot and method in METHODS else ("", key)
        values = parts.setdefault(method, {"settings": {}})
        (values if name in fields else values["settings"])[name] = value
    return parts.pop("", {"settings": {}}), parts


def _show_table(name: str, matrix: Any, how: dict[str, Any], json: bool) -> None:
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.errors import RunFailed
    from sparsepeft_cli.terminal.console import kept_from_stdout, out, print_json, table
    from sparsepeft_cli.terminal.matrix_progress import MatrixProgress
    from sparsepeft_research.reproduction import reproduce
    from sparsepeft_research.reproduction.render import cells

    keep_freed_memory()
    with kept_from_stdout(), MatrixProgress() as progress:
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
            out.print(f"- {note}", highlight=False)
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
    from sparsepeft.reprs import duration
    from sparsepeft_cli.terminal.console import table

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


@app.command(cls=Command)
def figure2(
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
