"""``sparsepeft evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepeft_cli.terminal import options
from sparsepeft_cli.terminal.errors import in_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparsepeft.training import Evaluation


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train`.")],
    test_file: Annotated[
        Path | None,
        typer.Option(
            help="Score these rows, with the run's labels, instead of what the run held out.", show_default=False
        ),
    ] = None,
    data_dir: options.DataDir = None,
    model: options.TrainedModel = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs per forward pass. [default: 32; of a language model as in training]"),
    ] = None,
    device: options.Device = None,
    infer: options.Infer = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also print precision, recall and F1 of each class, and the confusions.")
    ] = False,
    output: Annotated[Path | None, options.output("Write all of it to this file, as JSON.")] = None,
    json: options.Json = False,
    **rows: Any,
) -> None:
    """Score a trained run on what it was not trained on: validation and test parts, or a file of yours.

    Example: `sparsepeft evaluate out/topics --report`

    Example: `sparsepeft evaluate out/mine --test-file newer.csv --json`
    """
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.folders import write_json
    from sparsepeft.training import TableOptions, evaluate
    from sparsepeft_cli.terminal.console import err, out, print_json, say

    keep_freed_memory()
    with err.status("evaluating"):
        result = evaluate(
            folder,
            str(data_dir) if data_dir else None,
            model,
            test_file=test_file,
            table=TableOptions(**rows),
            batch_size=batch_size,
            device=device,
            infer=infer,
        )
    if output is not None:
        write_json(output, result.to_dict())
    if json:
        print_json(result.to_dict())
        return
    out.print(_scores(result, str(test_file or folder)))
    if report:
        for part in report_tables(result.report):
            out.print(part, highlight=False)
        if not result.report:
            say("note: --report tells of classes, and this task has none.")
    for note in result.notes:
        out.print(f"note: {in_options(note)}", highlight=False)


options.declare(command, options.section("Rows of a file", options.ROWS))


def _scores(result: Evaluation, title: str) -> Any:
    from sparsepeft_cli.terminal.console import table

    names = list(next(iter(result.metrics.values())))
    scores = {
        f"{part}, {infer}": (part, values)
        for infer, metrics in result.metrics_by_infer.items()
        for part, values in metrics.items()
    } or {part: (part, values) for part, values in result.metrics.items()}
    scores |= {f"{part}, thresholds 0.5": (part, values) for part, values in result.metrics_at_half.items()}
    rows = [
        [
            shown,
            *([f"{result.num_rows[part]:,}"] if result.num_rows else []),
            *(f"{values[name]:.4f}" for name in names),
        ]
        for shown, (part, values) in scores.items()
    ]
    return table(title, ["part", *(["rows"] if result.num_rows else []), *names], rows)


def report_tables(report: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """Tables of the classes, and for each class what it was taken for: that fits however many there are."""
    from sparsepeft_cli.terminal.console import table

    for part, content in report.items():
        classes = content["per_class"]
        rows = [
            [name, *(f"{each[key]:.3f}" for key in ("precision", "recall", "f1")), f"{each['support']:,}"]
            for name, each in classes.items()
        ]
        yield table(f"classes of {part}", ["class", "precision", "recall", "F1", "support"], rows)
        if matrix := content.get("confusion_matrix"):
            yield from _confusions(part, list(classes), matrix)


def _confusions(part: str, names: list[str], matrix: list[list[int]]) -> Iterator[Any]:
    """The matrix where it fits the screen, else the most frequent confusions."""
    from sparsepeft_cli.terminal.console import out, table

    widths = [max(len(name), *(len(f"{row[index]:,}") for row in matrix)) for index, name in enumerate(names)]
    title = f"confusions of {part}: rows are true, columns predicted"
    if sum(width + 3 for width in (max(map(len, names)), *widths)) + 1 <= out.width:
        rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, matrix, strict=True)]
        yield table(title, ["true", *names], rows)
        return
    from sparsepeft.scoring.evaluation import confusions

    wrong = confusions(names, matrix)
    rows = [[true, guess, f"{count:,}"] for count, true, guess in wrong[:20]]
    yield table(
        f"most frequent confusions of {part} ({len(wrong)} kinds; --json has all)", ["true", "predicted", "rows"], rows
    )
