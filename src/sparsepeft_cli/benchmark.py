"""``sparsepeft benchmark``: a command for each benchmark there is, whose options are its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.benchmark_reports import parts_of
from sparsepeft_cli.terminal import options
from sparsepeft_cli.terminal.errors import Command
from sparsepeft_cli.terminal.help import PlainGroup
from sparsepeft_research.benchmarks.registry import BENCHMARKS, Benchmark, Parameter

app = typer.Typer(cls=PlainGroup, no_args_is_help=True, help="Measure speed and memory on this machine.")

_FIGURE = "Figure to write, as .png and .svg. [default: beside that of --output]"
_RENAMED = {"inference": {"--device": "--emulate", "--max-inputs": "--max-examples"}}
_OLD_VALUES = {"inference": {"--device": ("raspberry-pi-4", "iphone-11")}}


def _add(benchmark: Benchmark) -> None:
    @options.renamed(_RENAMED.get(benchmark.name, {}), values=_OLD_VALUES.get(benchmark.name, {}))
    def command(output: Path | None, json: bool, **values: Any) -> None:
        from sparsepeft_cli.terminal.console import err, out, print_json, say
        from sparsepeft_research.benchmarks.registry import run_benchmark
        from sparsepeft_research.results import write_result

        given = {one.name: _read(one, values[one.name]) for one in benchmark.parameters}
        with err.status("measuring") as status:
            result = run_benchmark(benchmark.name, progress=status.update, **given)
        report = result.to_dict()
        if output is not None:
            write_result(output, result)
        written = _draw(report, values["figure"], output) if benchmark.is_drawn else []
        if json:
            print_json(report)
            return
        parts = parts_of(benchmark.name, report)
        for part in parts:
            out.print(part, highlight=False)
        if written:
            out.print(f"figure: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
        if output is None and not parts:
            say(f"{len(report['results'])} results; --output FILE keeps them, --json prints them")

    declared = {
        one.name: (_annotation(one), None if one.several else str(one.default) if one.parse else one.default)
        for one in benchmark.parameters
    }
    about_output = "JSON file to write" + ("; the figure goes beside it." if benchmark.is_drawn else ".")
    declared["output"] = (Annotated[Path | None, options.output(about_output)], None)
    if benchmark.is_drawn:
        declared["figure"] = (Annotated[Path | None, typer.Option(help=_FIGURE)], None)
    options.declare(command, declared | {"json": (options.Json, False)})
    example = f"sparsepeft benchmark {benchmark.name} {benchmark.example or f'--output {benchmark.name}.json'}"
    command.__doc__ = f"Measure {benchmark.measures}.\n\n{benchmark.note}\n\nExample: `{example}`"
    app.command(benchmark.name, cls=Command)(command)


def _annotation(one: Parameter) -> Any:
    help = one.help + (f" One of {', '.join(one.choices)}." if one.choices else "")
    kind = list[str] | None if one.several else Any if one.parse else one.type or type(one.default)
    more: dict[str, Any] = {"parser": one.parse} if one.parse else {"min": one.least}
    return Annotated[
        kind, typer.Option(one.option, help=help, metavar=one.metavar, envvar=one.variable, show_envvar=False, **more)
    ]


def _read(one: Parameter, value: Any) -> Any:
    if one.several is None:
        return value
    if one.several is int:
        return tuple(options.whole_numbers(one.option, value)) or one.default
    return tuple(map(one.several, options.several(value))) or one.default


def _draw(report: dict[str, Any], figure: Path | None, output: Path | None) -> list[Path]:
    """The figure's files; without matplotlib a warning, unless the figure was asked for."""
    from sparsepeft.errors import UserError
    from sparsepeft_cli.terminal.console import say
    from sparsepeft_research.benchmarks.inference.report import write_figure

    if figure is None and output is None:
        return []
    path = figure or output.with_suffix("")  # type: ignore[union-attr]
    try:
        return write_figure(report, path.with_suffix("") if path.suffix in (".png", ".svg") else path)
    except UserError as error:
        if figure is not None:
            raise
        say(str(error))
        return []


for _benchmark in BENCHMARKS.values():
    _add(_benchmark)
