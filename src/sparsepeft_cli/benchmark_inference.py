"""``sparsepeft benchmark inference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options

_MIB = 2**20


@options.renamed(
    {"--device": "--emulate", "--max-inputs": "--max-examples"}, values={"--device": ("raspberry-pi-4", "iphone-11")}
)
def command(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="roberta-base (random weights, nothing to download), minilm, a hub id or a folder."
        ),
    ] = "roberta-base",
    systems: Annotated[
        list[str] | None,
        options.names(
            "--systems",
            "Some of backbone, full, spartan, pfeiffer, houlsby, lora, spartan-unfused, engine, adapters-pfeiffer, "
            "adapters-houlsby",
            "all; for tasks: backbone, spartan, engine and the adapters-",
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None,
        options.names(
            "--precisions",
            "Some of fp32, bf16, int8, onnx-fp32, onnx-int8, openvino-fp32, openvino-bf16",
            "all",
        ),
    ] = None,
    workload: Annotated[
        str, typer.Option(metavar="NAME", help="fixed: texts of one length; tasks: texts as tasks have them.")
    ] = "fixed",
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPES",
            help="fixed: batch size x tokens (a,b or repeated); 1 x is latency. [default: 32x128, 1x32]",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, options.names("--tasks", "tasks: whose validation texts", "sst2, mrpc, qnli")
    ] = None,
    data_dir: options.DataDir = None,
    max_examples: Annotated[
        int, typer.Option(metavar="N", min=0, help="tasks: a sample of so many texts of each; 0 takes all.")
    ] = 256,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="fixed: nine tasks in a batch, nine for each text, a hundred in memory, too."),
    ] = False,
    threads: options.Threads = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu: the systems are compared on processors.")] = "cpu",
    emulate: Annotated[
        str | None, typer.Option(metavar="NAME", help="With the limits of raspberry-pi-4 or iphone-11.")
    ] = None,
    peers_python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Python of an environment with AdapterHub's adapters; see docs/edge.md."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Timed passes of each candidate; ten times as many for latency.")
    ] = 9,
    starts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Times that all processes are started, each for all repeats.")
    ] = 1,
    one_process: Annotated[
        bool, typer.Option("--one-process", help="The backbone and its adapted forms share a process and its weights.")
    ] = False,
    idle_wait: options.IdleWait = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights and texts.")] = 0,
    output: Annotated[Path | None, options.output("JSON file to write; the figure goes beside it.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Figure to write, as .png and .svg. [default: beside that of --output]"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure throughput, latency and peak memory of a backbone with and without adapters, of peers, of many tasks.

    Every system is a process of its own with equal threads (but see `--one-process`); they take turns.

    Example: `sparsepeft benchmark inference --precisions fp32,bf16 --mixed --output inference.json`
    """
    from sparsepeft.errors import UserError
    from sparsepeft_cli.benchmark import measured
    from sparsepeft_cli.terminal.console import out
    from sparsepeft_research.benchmarks.inference import PRECISIONS

    if device != "cpu":
        raise UserError(
            f"--device {device} was given, but this benchmark compares processors; leave it out, or pass cpu."
        )
    report = measured(
        "inference",
        output,
        json,
        model=model,
        systems=tuple(options.several(systems)) or None,
        precisions=_precisions(precisions) or PRECISIONS,
        workload=workload,
        shapes=_shapes(shapes) or ((32, 128), (1, 32)),
        tasks=tuple(options.several(tasks)) or ("sst2", "mrpc", "qnli"),
        data_dir=data_dir,
        max_inputs=max_examples or None,
        mixed=mixed,
        threads=threads,
        emulate=emulate,
        peers_python=peers_python,
        repeats=repeats,
        starts=starts,
        one_process=one_process,
        idle_wait_s=idle_wait,
        seed=seed,
    )
    written = _draw(report, figure or (output and output.with_suffix("")), is_asked=figure is not None)
    if json:
        return
    for part in _parts(report):
        out.print(part, highlight=False, markup=False)
    if written:
        out.print(f"figure: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _draw(report: dict[str, Any], path: Path | None, is_asked: bool) -> list[Path]:
    """The figure's files; without matplotlib a warning, unless the figure was asked for."""
    from sparsepeft.errors import UserError
    from sparsepeft_cli.terminal.console import err
    from sparsepeft_research.benchmarks.inference.report import write_figure

    if path is None:
        return []
    try:
        return write_figure(report, path.with_suffix("") if path.suffix in (".png", ".svg") else path)
    except UserError as error:
        if is_asked:
            raise
        err.print(str(error), highlight=False, markup=False)
        return []


def _precisions(values: list[str] | None) -> tuple[str, ...]:
    """``["fp32", "onnx-bf16"]`` -> ``("float32", "onnx-bfloat16")``, as result files have them."""
    from sparsepeft.errors import UserError, unknown_name
    from sparsepeft_research.benchmarks.inference import PRECISIONS

    known = {options.short_dtype(name): name for name in PRECISIONS}
    names = [options.short_dtype(value) for value in options.several(values)]
    for name in names:
        if name not in known:
            raise UserError(unknown_name("The precision", name, known))
    return tuple(known[name] for name in names)


def _shapes(values: list[str] | None) -> tuple[tuple[int, int], ...]:
    from sparsepeft.errors import UserError

    shapes = []
    for text in options.several(values):
        size, x, length = text.partition("x")
        if not (x and size.isdecimal() and length.isdecimal()):
            raise UserError(f"--shapes {text} was given; expected batch sizes and lengths, such as 32x128,1x32.")
        shapes.append((int(size), int(length)))
    return tuple(shapes)


def _parts(report: dict[str, Any]) -> list[Any]:
    """Tables of the results and factors, and sentences on what is not in them."""
    from sparsepeft_cli.terminal.console import table

    settings = report["settings"]
    parts: list[Any] = [f"{settings['model']}, {settings['threads']} threads of each process"]
    for one in report["results"]:
        rows = []
        for name, candidate in one["candidates"].items():
            over_bare = candidate["speed_over"].get(f"backbone {name.split()[-1]}")
            share, peak = candidate.get("share_of_peak"), candidate["peak_bytes"]
            rows.append(
                [
                    options.short_dtype(name),
                    f"{candidate['timing']['median_ms']:.1f}",
                    f"{candidate['inputs_per_minute']:.1f}",
                    "" if over_bare is None else f"{over_bare:.3f}",
                    "" if peak is None else f"{peak / _MIB:.0f}",
                    "" if share is None else f"{share:.0%}",
                ]
            )
        header = ["system", "ms", "per min", "vs bare", "MiB", "share"]
        parts.append(table(options.short_dtype(f"{one['group']}: {one['plan']}"), header, rows))
    parts.append(
        "per min: inputs per minute; vs bare: over the bare backbone's in this precision; MiB: peak memory of the "
        "process; share: of the machine's speed at matrix products"
    )
    parts += map(_factor, report["factors"])
    loading = report["loading"]
    if loading:
        parts.append(
            f"{loading['num_loaded']} tasks in memory: {loading['resident_over_files']:.2f} times their files; another "
            f"task's turn {loading['switch_ms']:.2f} ms, swap {loading['swap_ms']:.2f} ms, with reading "
            f"{loading['replace_ms']:.1f} ms"
        )
    parts += [f"not emulated: {note}" for note in _not_emulated(report)]
    parts += [f"{name} was left out: {reason}" for name, reason in report["left_out"].items()]
    return [options.short_dtype(part) if isinstance(part, str) else part for part in parts]


def _factor(factor: dict[str, Any]) -> str:
    ends = " over ".join(f"{factor[end][0]} ({factor[end][1]})" for end in ("of", "over") if end in factor)
    return f"{factor['factor']} ({factor['group']}): {factor['value']:.3f}" + (f", {ends}" if ends else "")


def _not_emulated(report: dict[str, Any]) -> list[str]:
    notes = [
        note for ready in report["processes"].values() for note in ready.get("emulation", {}).get("not_emulated", ())
    ]
    return list(dict.fromkeys(notes))
