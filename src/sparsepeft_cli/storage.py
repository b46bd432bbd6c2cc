"""``sparsepeft storage``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options


@options.renamed({"--method": "--methods", "--tasks": "--num-tasks", "--head": "--head-type"})
def command(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Hub id, local folder, minilm, or roberta-base (known without a hub).")
    ] = "minilm",
    num_tasks: Annotated[int, typer.Option(min=1, help="Tasks on the device.")] = 9,
    num_labels: Annotated[int, typer.Option(min=1, help="Labels of each task.")] = 2,
    dtype: Annotated[str, options.dtype("--dtype", "Of all weights: fp32, bf16 or fp16.")] = "fp32",
    save_dtype: Annotated[
        str | None,
        options.dtype(
            "--save-dtype", "Of the tasks' files: also int8, with a scale for each row. [default: that of --dtype]"
        ),
    ] = None,
    methods: Annotated[list[str] | None, options.names("--methods", "Only these methods", "all")] = None,
    json: options.Json = False,
    **sizes: Any,
) -> None:
    """What a device stores for many tasks on one backbone, method by method. Needs no weights.

    Example: `sparsepeft storage --model roberta-base --num-tasks 9`
    """
    import dataclasses

    from sparsepeft.storage import storage_report
    from sparsepeft.storage.counting import Sizes
    from sparsepeft_cli.terminal.console import out, print_json
    from sparsepeft_research.reproduction.paper import paper_storage

    report = storage_report(
        model,
        num_tasks,
        num_labels=num_labels,
        dtype=dtype,
        methods=options.several(methods) or None,
        save_dtype=save_dtype,
        **sizes,
    )
    figures, notes = paper_storage(model, num_tasks, report.backbone_parameters, Sizes(**sizes))
    report = dataclasses.replace(report, notes=report.notes + notes)
    if json:
        print_json(report.to_dict() | {"paper": [dataclasses.asdict(figure) for figure in figures]})
        return
    for part in _tables(report, figures):
        out.print(part, highlight=False)


options.declare(
    command,
    {
        name: (Annotated[type(default), typer.Option(f"--{name.replace('_', '-')}", help=help, **more)], default)
        for name, default, help, more in (
            ("head_type", "model", "Head of SPARTAN and adapters: model or linear.", {"metavar": "TYPE"}),
            ("num_parents", 16, "SPARTAN's P.", {"min": 1}),
            ("num_children", 3, "SPARTAN's C.", {"min": 1}),
            ("parent_keys", "flat", "SPARTAN's: flat or product.", {"metavar": "KIND"}),
            ("train_layer_norms", False, "SPARTAN's tasks have norms of their own (recipe best).", {}),
            ("reduction_factor", 12, "Of the adapters' bottlenecks.", {"min": 1}),
            ("lora_rank", 8, "Of LoRA.", {"min": 1}),
        )
    },
)


def _tables(report: Any, figures: Sequence[Any]) -> list[Any]:
    from sparsepeft.reprs import megabytes, millions
    from sparsepeft_cli.terminal.console import table

    title = (
        f"{report.num_tasks} tasks on {report.model} ({report.backbone_parameters:,} parameters, "
        f"{megabytes(report.backbone_bytes)} in {options.short_dtype(report.dtype)})"
    )
    columns = ["method", "per task", "+ head", "file/task", "all tasks", "bytes", "ratio"]
    rows = [
        [
            row.method,
            millions(row.parameters_per_task),
            millions(row.head_parameters_per_task[0]),
            megabytes(row.file_bytes_per_task[0]),
            millions(row.total_parameters),
            megabytes(row.total_bytes),
            row.ratio_text,
        ]
        for row in report.methods
    ]
    parts: list[Any] = [table(title, columns, rows)]
    parts += [f"{row.method:<9}{row.formula}" for row in report.methods]
    if figures:
        paper = [
            [
                figure.method,
                figure.formula,
                millions(figure.parameters_per_task),
                millions(figure.total_parameters),
                megabytes(figure.total_bytes),
                figure.ratio_text,
            ]
            for figure in figures
        ]
        columns = ["method", "formula", "per task", "all tasks", "bytes", "ratio"]
        parts += ["", table("The paper's figures (9 tasks, heads left out)", columns, paper)]
    return parts + [f"note: {note}" for note in report.notes]
