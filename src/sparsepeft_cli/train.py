"""``sparsepeft train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli._train_lm import train_lm

_LM, _SPT = "Language models (--task lm)", "Sparse models (SPT)"


def command(
    task: Annotated[
        str | None, typer.Option(help="Task: a GLUE task, bbc-news, topics, custom with --train-file, lm with --text.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for weights and results.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="spartan, pfeiffer, houlsby, lora, ia3, bitfit, head or full. [default: spartan; lora for lm]"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or local folder. [default: the bundled MiniLM]")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SPARSEPEFT_DATA", help="Folder with the tasks' files; without it, the hub.")
    ] = None,
    train_file: Annotated[Path | None, typer.Option(help="Your own CSV, TSV, JSONL, JSON or parquet.")] = None,
    validation_file: Annotated[Path | None, typer.Option(help="Held-out rows; else a tenth of --train-file.")] = None,
    test_file: Annotated[Path | None, typer.Option(help="Rows that are scored once, at the end.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second text, for pairs.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(help="Of --train-file: regression, single_label or multi_label. [default: by its labels]"),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of CSV or TSV: a character, tab or semicolon. [default: by their rows]")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of your own files. [default: UTF-8, UTF-16 by its mark, else cp1252]")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training data. [default: the paper's; 1 for lm]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    max_train_samples: Annotated[int | None, typer.Option(help="Use this many training examples.")] = None,
    few_shot: Annotated[int | None, typer.Option(help="Train on N examples, 1000 steps: the paper's protocol.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [default: the recipe's]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step. [default: 16]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut texts to this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and order. [default: 42]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [default: fp32]")] = None,
    cache_frozen_layers: Annotated[
        bool | None, typer.Option("--cache-frozen-layers", help="Run layers below the lowest adapter once per example.")
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Run the model through torch.compile.")] = None,
    score_on: Annotated[
        str | None, typer.Option(help="validation, or selection: a tenth of the training data. [default: validation]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Hyperparameters: best or paper. [default: best]")] = None,
    save_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the saved weights: float32, bf16, fp16 or int8.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Training text: .txt, .jsonl, .csv or .tsv; may be repeated.", rich_help_panel=_LM),
    ] = None,
    validation_text: Annotated[
        list[Path] | None, typer.Option(help="Held-out text; else a tenth of --text.", rich_help_panel=_LM)
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens per example. [default: the model's, at most 512]", rich_help_panel=_LM)
    ] = None,
    bos_token: Annotated[
        bool | None,
        typer.Option(
            "--bos-token/--no-bos-token",
            help="Begin each example with the begin-of-text token. [default: if the tokenizer does so by itself]",
            rich_help_panel=_LM,
        ),
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Batches that make a step. [default: 1]", rich_help_panel=_LM)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory for more time.", rich_help_panel=_LM),
    ] = None,
    spt: Annotated[
        bool | None,
        typer.Option("--spt", help="Make attention and FFNs sparse before fine-tuning.", rich_help_panel=_SPT),
    ] = None,
    spt_set: Annotated[
        list[str] | None,
        typer.Option("--spt-set", metavar="KEY=VALUE", help="A setting of SptConfig.", rich_help_panel=_SPT),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON with these options; flags win.")] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Trackers: tensorboard, wandb, ... [default: none; history.jsonl anyway]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a run in the output folder, once this one is finished.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train a task's adapter, choose the best checkpoint on a tenth of the training data, score it once.

    An interrupted run goes on when the same command is given again, with the same data.

    With `--task lm`: fine-tune a language model on plain text and measure its perplexity. With `--spt` the model is
    made sparse before the adapter is put on.

    Example: `sparsepeft train --task topics --output-dir out/topics --epochs 5`

    Example: `sparsepeft train --task lm --model MODEL --text mine.txt --spt --output-dir out/mine`
    """
    flags: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("set_", "config", "overwrite", "json")}
    from sparsepeft.training.early import check_early

    check_early(flags, config, overwrite)
    from sparsepeft.allocator import keep_freed_memory
    from sparsepeft.training import is_language_model, load_config, parse_settings, train
    from sparsepeft_cli._console import out, print_json
    from sparsepeft_cli._progress import TrainingProgress

    flags = {key: _plain(value) for key, value in flags.items()}
    flags["settings"] = parse_settings(set_ or [])
    flags["spt_set"] = parse_settings(spt_set, "--spt-set", "num_active_blocks=6") if spt_set else None
    keep_freed_memory()
    if is_language_model(flags, config):
        train_lm(flags, config, overwrite, json)
        return
    run = load_config(flags, config)
    with TrainingProgress() as progress:
        results = train(run, callbacks=progress.callbacks, overwrite=overwrite, announce=progress.announce)
    if json:
        print_json(results)
    else:
        out.print(_summary(results, run.output_dir), highlight=False)


def _plain(value: Any) -> Any:
    """Paths as strings, as configs have them; None for an option that was not given once."""
    if isinstance(value, list):
        return [_plain(each) for each in value] or None
    return str(value) if isinstance(value, Path) else value


def _summary(results: dict[str, Any], folder: str) -> str:
    from sparsepeft_cli._console import megabytes, program
    from sparsepeft_cli.sparsify import sparse_line

    parameters = results["parameters"]
    lines = [
        f"[bold]{results['task']}[/bold], {results['method']}: {results['main_metric']} "
        f"[bold green]{results['score']:.4f}[/bold green] on {results['score_split']} "
        f"({results['num_train']:,} training examples, {results['train_seconds']:.0f} s)",
        f"{parameters['trained']:,} parameters trained, of them {parameters['head']:,} in the head"
        + (f"; memory: {results['formula']}" if "formula" in results else ""),
        f"saved {megabytes(results['saved_bytes'])}; a copy of the model has {megabytes(results['model_bytes'])}",
    ]
    if "spt" in results:
        lines.insert(1, sparse_line(results["spt"]["config"], results["spt"]["report"]))
    lines += [f"note: {note}" for note in results["notes"]]
    lines.append(f'next: {program()} predict {folder} "some text"')
    return "\n".join(lines)
