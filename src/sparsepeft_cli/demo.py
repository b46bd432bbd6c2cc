"""``sparsepeft demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparsepeft_cli.terminal import options


def command(
    output_dir: Annotated[Path, options.output_dir("Folder for the two runs.")] = Path("outputs/demo"),
    json: options.Json = False,
) -> None:
    """Train a memory on a built-in sample, compare it with a head alone, use it. Two minutes on two cores.

    Example: `sparsepeft demo`
    """
    import dataclasses

    from sparsepeft.reprs import megabytes
    from sparsepeft.training.demo import run_demo
    from sparsepeft_cli.terminal.console import out, print_json, program, table
    from sparsepeft_cli.terminal.progress import TrainingProgress

    with TrainingProgress() as progress:
        result = run_demo(output_dir, callbacks=lambda name: progress.labelled(name).callbacks)
    if json:
        print_json(dataclasses.asdict(result))
        return
    rows = [
        ["majority class", f"{result.majority:.1%}", "0", "0 B"],
        *(
            [name, f"{run['score']:.1%}", f"{run['parameters']['trained']:,}", megabytes(run["saved_bytes"])]
            for name, run in (("trained head alone", result.head), ("SPARTAN memory + head", result.spartan))
        ),
    ]
    run = result.spartan
    out.print(table("topics: 5 topics, 120 test texts", ["method", "test accuracy", "trained", "saved"], rows))
    out.print(
        f"backbone          {run['model']}, frozen; a full copy of the model would be {megabytes(run['model_bytes'])}\n"
        f"memory            {run['formula']} parameters + {run['parameters']['head']:,} in the head\n"
        f"inference         {result.throughput_ratio:.3f} of the bare backbone's throughput\n"
        f"training          {run['train_seconds']:.0f} s, {run['num_train']} texts, {run['steps']} steps\n",
        highlight=False,
    )
    for text, prediction in result.predictions:
        out.print(f"  {prediction.label:<9} {prediction.score:5.1%}  {text}", highlight=False)
    out.print(f'\nNext: {program()} predict {output_dir}/spartan "Any sentence you like."', highlight=False)
