"""``sparsepeft train --task lm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_cli.terminal.errors import in_options


def train_lm(flags: dict[str, Any], config: Path | None, overwrite: bool, json: bool) -> str:
    """Fine-tune a language model as the flags of ``sparsepeft train`` say, and print the results; the run's folder."""
    from sparsepeft.training import load_language_model_config, train_language_model
    from sparsepeft_cli.sparsify import report_parts
    from sparsepeft_cli.terminal.console import out, print_json
    from sparsepeft_cli.terminal.progress import TrainingProgress

    run = load_language_model_config(flags, config)
    with TrainingProgress() as progress:
        results = train_language_model(
            run, callbacks=progress.callbacks, overwrite=overwrite, announce=progress.announce
        )
    if json:
        print_json(results)
        return run.output_dir
    if results["spt"]:
        for part in report_parts(results["spt"]["config"], results["spt"]["report"], "before fine-tuning"):
            out.print(part, highlight=False)
    out.print(_summary(results, run.output_dir), highlight=False)
    return run.output_dir


def _summary(results: dict[str, Any], folder: str) -> str:
    from rich.markup import escape

    from sparsepeft_cli.terminal.console import megabytes, program

    begin = f" that begin with {escape(results['bos_token'])}" if results["bos_token"] else ""
    before = ", ".join(f"{kind} {values['perplexity']:.2f}" for kind, values in results["before"].items())
    parameters = results["parameters"]
    routers = f", of them {parameters['routers']:,} in the routers" if parameters["routers"] else ""
    lines = [
        f"[bold]lm[/bold], {results['method']}: perplexity [bold green]{results['score']:.2f}[/bold green] on "
        f"{results['num_validation_tokens']:,} held-out tokens (before: {before})",
        f"{results['num_train_tokens']:,} training tokens in blocks of {results['block_length']}{begin}, "
        f"{results['steps']} steps, {results['train_seconds']:.0f} s",
        f"{parameters['trained']:,} parameters trained{routers}",
        f"saved {megabytes(results['saved_bytes'])}; a copy of the model has {megabytes(results['model_bytes'])}",
    ]
    lines += [f"note: {in_options(note)}" for note in results["notes"]]
    lines.append(f'next: {program()} generate {folder} "some text"')
    return "\n".join(lines)
