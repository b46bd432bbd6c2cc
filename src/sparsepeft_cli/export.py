"""``sparsepeft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options

# Parts of a task's report that tell its score in a lower precision.
_LOWER = {"int8_tasks": "int8 tasks", "int8": "int8", "bfloat16": "bf16"}


def command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Output folders of `sparsepeft train`; tasks are called after them."),
    ],
    output_dir: Annotated[Path, options.output_dir("Folder for the backbone, the tasks and the runner.")],
    format: Annotated[str, typer.Option(metavar="NAME", help="onnx, openvino or executorch.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: weights of the backbone and of the tasks in int8.")
    ] = False,
    data_dir: options.DataDir = None,
    model: options.TrainedModel = None,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Held-out part to compare on: validation, test, ...")
    ] = "validation",
    tolerance: Annotated[float, typer.Option(help="Largest deviation of a score from PyTorch's.")] = 1e-4,
    max_examples: options.MaxExamples = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Export trained tasks for devices without PyTorch: the backbone once, a small file for each task, a runner.

    Example: `sparsepeft export out/sst2 out/rte --output-dir out/device --int8`
    """
    from sparsepeft.export import export_tasks
    from sparsepeft_cli.terminal.console import err, out, print_json

    with err.status("exporting") as status:
        report = export_tasks(
            folders,
            output_dir,
            format=format,
            int8=int8,
            model=model,
            data_dir=str(data_dir) if data_dir else None,
            split=split,
            tolerance=tolerance,
            max_examples=max_examples,
            overwrite=overwrite,
            progress=status.update,
        )
    if json:
        print_json(report)
        return
    for part in _parts(report, output_dir, split):
        out.print(part, highlight=False, soft_wrap=True)


def _parts(report: dict[str, Any], folder: Path, split: str) -> list[Any]:
    from sparsepeft.reprs import megabytes
    from sparsepeft_cli.terminal.console import table

    lower = [key for key in _LOWER if any(key in task for task in report["tasks"].values())]
    columns = [
        "task",
        "texts",
        "deviation",
        "other labels",
        "adapter",
        *(["fp32", *(_LOWER[key] for key in lower)] if lower else []),
    ]
    rows = []
    for name, task in report["tasks"].items():
        row = [name, task["num_texts"], f"{task['max_deviation']:.1e}", task["num_other_labels"]]
        row.append(megabytes(max(task["bytes"].values())))
        if lower:
            scores = (task[lower[0]].get("before"), *(task[key].get("after") for key in lower))
            row += ["–" if score is None else f"{score:.4f}" for score in scores]
        rows.append(row)
    notes = [
        f"note: {name} was checked on {task['checked_on']}"
        for name, task in report["tasks"].items()
        if task["checked_on"] != f"the task's {split} set"
    ]
    backbone = megabytes(max(report["bytes"].values()))
    return [
        table(f"{report['backbone']}: {backbone}", columns, rows),
        *notes,
        f'next: python {folder / "run.py"} {next(iter(report["tasks"]))} "some text"',
    ]
