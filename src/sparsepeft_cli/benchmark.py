"""``sparsepeft benchmark``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli import benchmark_inference
from sparsepeft_cli.terminal import options
from sparsepeft_cli.terminal.errors import Command
from sparsepeft_cli.terminal.help import PlainGroup
from sparsepeft_research.benchmarks.registry import BENCHMARKS, Benchmark

app = typer.Typer(cls=PlainGroup, no_args_is_help=True, help="Measure speed and memory on this machine.")


@app.command(cls=Command)
def spt(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="opt-1024, opt-2048, opt-2560, llama-2560, llama-4096 (random weights), or a hub id or folder.",
        ),
    ] = "opt-1024",
    layers: Annotated[int, typer.Option(metavar="N", help="Transformer layers.")] = 4,
    lengths: Annotated[list[str] | None, options.numbers("--lengths", "Tokens of a sequence", "2048")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences in a step.")] = 1,
    granularity: Annotated[str, typer.Option(metavar="NAME", help="Sparse attention by token or block.")] = "block",
    num_blocks: Annotated[int, typer.Option(metavar="N", help="G, blocks of neurons of an FFN.")] = 8,
    active_blocks: Annotated[
        list[str] | None, options.numbers("--active-blocks", "G', blocks that a token uses", "4, 2")
    ] = None,
    top_l: Annotated[
        Any,
        typer.Option(
            parser=_number, metavar="NUMBER", help="Keys a query keeps: 64, or a fraction of the length, 0.5."
        ),
    ] = "0.125",
    threads: options.Threads = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, options.dtype("--dtype", "Of the weights: fp32, bf16 or fp16.")] = "fp32",
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed steps of each candidate.")] = 5,
    idle_wait: options.IdleWait = 0.0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Measure the dense model through torch.compile, too.")
    ] = False,
    output: Annotated[Path | None, options.output("JSON file to write.")] = None,
    json: options.Json = False,
) -> None:
    """Measure a LoRA fine-tuning step, dense against sparse: time, where it goes, and peak memory above the weights.

    Example: `sparsepeft benchmark spt --model opt-1024 --lengths 2048,8192 --output spt.json`
    """
    import torch

    from sparsepeft_cli.terminal.console import out

    if threads is not None:
        torch.set_num_threads(threads)
    results = measured(
        "spt",
        output,
        json,
        model=model,
        layers=layers,
        lengths=tuple(options.whole_numbers("--lengths", lengths)) or (2048,),
        batch_size=batch_size,
        granularity=granularity,
        num_blocks=num_blocks,
        active_blocks=tuple(options.whole_numbers("--active-blocks", active_blocks)) or (4, 2),
        top_l=top_l,
        device=device,
        dtype=dtype,
        repeats=repeats,
        idle_wait_s=idle_wait,
        compile=compile,
    )
    if json:
        return
    for result in results["results"]:
        for part in _tables(result, results["settings"]):
            out.print(part, highlight=False)
        for name, reason in result["left_out"].items():
            out.print(f"{name} was left out: {reason}", highlight=False)


def measured(name: str, output: Path | None, json: bool, **values: Any) -> dict[str, Any]:
    """Run a benchmark with a status line, write its result file and print its JSON, as asked."""
    from sparsepeft_cli.terminal.console import err, print_json
    from sparsepeft_research.benchmarks.registry import run_benchmark
    from sparsepeft_research.results import write_result

    with err.status("measuring") as status:
        result = run_benchmark(name, progress=status.update, **values)
    if output is not None:
        write_result(output, result)
    if json:
        print_json(result.to_dict())
    return result.to_dict()


def _add(benchmark: Benchmark) -> None:
    """A command whose options are the benchmark's parameters."""

    def command(output: Path | None, json: bool, **values: Any) -> None:
        from sparsepeft_cli.terminal.console import say

        report = measured(benchmark.name, output, json, **values)
        if not json and output is None:
            say(f"{len(report['results'])} results; --output FILE keeps them, --json prints them")

    annotations: dict[str, Any] = {
        one.name: Annotated[
            type(one.default),
            typer.Option(
                f"--{one.name.replace('_', '-')}",
                help=one.help + (f" One of {', '.join(one.choices)}." if one.choices else ""),
            ),
        ]
        for one in benchmark.parameters
    }
    defaults = {one.name: one.default for one in benchmark.parameters} | {"output": None, "json": False}
    annotations |= {"output": Annotated[Path | None, options.output("JSON file to write.")], "json": options.Json}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    command.__annotations__ = annotations
    command.__doc__ = (
        f"Measure {benchmark.measures}.\n\n"
        f"Example: `sparsepeft benchmark {benchmark.name} --output {benchmark.name}.json`"
    )
    app.command(benchmark.name, cls=Command)(command)


app.command("inference", cls=Command)(benchmark_inference.command)
for _benchmark in BENCHMARKS.values():
    if _benchmark.settings is None:
        _add(_benchmark)


def _number(text: str) -> int | float:
    """A count or a fraction, told apart as Python does: 1 is a count, 1.0 a fraction."""
    return int(text) if text.strip().isdecimal() else float(text)


def _tables(result: dict[str, Any], settings: dict[str, Any]) -> list[Any]:
    from sparsepeft_cli.terminal.console import table

    title = (
        f"{settings['model']}, {settings['layers']} layers, {settings['batch_size']} x {result['length']} tokens, "
        f"{options.short_dtype(settings['dtype'])}, {settings['device']}"
    )
    steps, splits = [], []
    for name, candidate in result["candidates"].items():
        steps.append(
            [
                name,
                f"{candidate['step']['median_ms']:.1f}",
                _ratio(candidate["speedup_over"].get("sdpa")),
                f"{candidate['peak_bytes'] / 2**20:.1f}",
                _ratio(candidate["peak_of"].get("sdpa")),
                _ratio(candidate["peak_of"].get("eager")),
            ]
        )
        if "split_ms" in candidate:
            splits.append([name, *(f"{candidate['split_ms'][part]:.1f}" for part in ("attention", "ffn", "rest"))])
    return [
        table(title, ["step", "ms", "speed-up", "peak MiB", "of SDPA's", "of eager's"], steps),
        table("one step, by module", ["ms", "attention", "FFN", "rest"], splits),
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
