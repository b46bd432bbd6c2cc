"""``sparsepeft inspect``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options

_MOST_ROWS = 64  # of a table of parents


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train --method spartan`.")
    ],
    layer: Annotated[int | None, typer.Option(min=0, help="Only this layer, counted from 0. [default: all]")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Held-out part: validation, test, ... [default: test where there is one]"),
    ] = None,
    max_examples: options.MaxExamples = None,
    output_dir: Annotated[
        Path | None, options.output_dir("Folder for JSON, PNG, SVG and an HTML page; needs matplotlib.")
    ] = None,
    compare_untrained: Annotated[
        bool, typer.Option("--compare-untrained", help="Also inspect a fresh memory, for comparison.")
    ] = False,
    keep_stop_words: Annotated[
        bool, typer.Option("--keep-stop-words", help="List function words and punctuation among the words, too.")
    ] = False,
    data_dir: options.DataDir = None,
    model: options.TrainedModel = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Show what each parent cell of a trained memory has learned, on texts it was not trained on.

    Example: `sparsepeft inspect out/topics --output-dir out/topics/inspection`
    """
    from sparsepeft.inspection import inspect_run
    from sparsepeft.inspection.page import PAGE, check_folder, write_inspection
    from sparsepeft.plotting import require_matplotlib
    from sparsepeft_cli.terminal.console import err, out, print_json

    if output_dir is not None:
        require_matplotlib()
        check_folder(output_dir)
    with err.status("reading memories"):
        report = inspect_run(
            folder,
            split=split,
            layer=layer,
            max_examples=max_examples,
            data_dir=str(data_dir) if data_dir else None,
            model=model,
            batch_size=batch_size,
            compare_untrained=compare_untrained,
            keep_stop_words=keep_stop_words,
            device=device,
        )
        if output_dir is not None:
            write_inspection(report, output_dir)
    if json:
        print_json(report.to_dict())
        return
    for part in report_tables(report):
        out.print(part, highlight=False)
    if output_dir is not None:
        out.print(f"page: {output_dir / PAGE}", highlight=False)


def report_tables(report: Any) -> list[Any]:
    """What a ``MemoryReport`` shows on a console: all layers, and the parents of the last."""
    from sparsepeft.inspection.figures import most_used
    from sparsepeft_cli.terminal.console import table

    last, has_labels = report.layers[-1], report.label_names is not None
    fresh = report.untrained.layers if report.untrained else [None] * len(report.layers)
    columns = ["layer", *(["NMI docs", "NMI pos."] if has_labels else [])]
    columns += ["untrained"] if has_labels and report.untrained else []
    rows = []
    for layer, untrained in zip(report.layers, fresh, strict=True):
        name = f"{layer.index}, decoder" if "decoder" in layer.name.split(".") else layer.index
        row = [name, *([_number(layer.nmi_documents), _number(layer.nmi_positions)] if has_labels else [])]
        if has_labels and untrained:
            of_positions = untrained.nmi_documents is None  # labels of tokens
            row.append(_number(untrained.nmi_positions if of_positions else untrained.nmi_documents))
        rows.append([*row, _number(layer.gate_entropy), f"{layer.moved:.1%}", layer.describe_dead()])
    title = f"{last.documents:,} documents, {last.positions:,} positions"
    layers = table(title, [*columns, "entropy", "moved", "dead"], rows)

    by_position = has_labels and all(parent.purity is None for parent in last.parents)
    of_labels = ["tags of which most come to it"] if by_position else ["purity", "main label"]
    columns = ["parent", "comes first", "picks", "documents", *(of_labels if has_labels else [])]
    rows = []
    parents = last.parents if len(last.parents) <= _MOST_ROWS else most_used(last)
    for parent in parents:
        purity = "–" if parent.purity is None else f"{parent.purity:.1%}"
        shares = [f"{name} {share:.0%}" for name, share in last.label_shares(parent).items() if share][:3]
        row = [parent.index, f"{parent.share_first:.1%}", f"{parent.share_picked:.1%}", parent.documents]
        found = [", ".join(shares) or "–"] if by_position else [purity, parent.main_label or "–"]
        rows.append(row + (found if has_labels else []))
    words = [f"  {p.index}: {', '.join(f'“{word.word}”' for word in p.words)}" for p in parents if p.words]
    return [
        layers,
        *_legend(has_labels, last.top_k),
        table(f"parents of {last.name}", columns, rows),
        *(["words that a parent meets more than the others do (z of at least 2):", *words] if words else []),
        *(f"note: {note}" for note in report.notes),
    ]


def _legend(has_labels: bool, top_k: int) -> list[str]:
    nmi = (
        "NMI: what the parent picked says about the label of a document or position, from 0 (nothing) to 1 (all); "
        "high is what is well above an untrained memory's (--compare-untrained)"
    )
    entropy = (
        f"entropy: of the weights of the {top_k} parents kept, from 0 (one has all the weight) to "
        f"{math.log(top_k):.3f} (all weigh the same)"
    )
    return [*([nmi] if has_labels else []), entropy, "moved: norm of what the memory adds over that of the state"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
