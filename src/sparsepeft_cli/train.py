"""``sparsepeft train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepeft_cli.terminal import options

if TYPE_CHECKING:
    from sparsepeft.training import RunConfig

_DATA, _METHOD, _TRAINING = "Data", "Model and method", "Training"
_OUTPUT, _LM, _SPT = "Output", "Language models (--task lm)", "Sparse models (SPT)"
_NOT_IN_CONFIG = ("set_", "config", "overwrite", "json", "dry_run", "push_to_hub", "private")


@options.renamed({"--gradient-accumulation": "--gradient-accumulation-steps"})
def command(
    task: Annotated[
        str | None,
        typer.Option(
            help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, bbc-news, topics (comes with the package), "
            "custom with --train-file, lm with --text.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for weights and results. [required]", rich_help_panel=_OUTPUT),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="spartan, pfeiffer, houlsby, lora, ia3, bitfit, head or full. [default: spartan; lora for lm]",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or local folder. [default: the bundled MiniLM]", rich_help_panel=_METHOD),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="SPARSEPEFT_DATA",
            show_envvar=False,
            help="Folder with the tasks' files. [default: $SPARSEPEFT_DATA, else the hub]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    train_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own CSV, TSV, JSONL, JSON or parquet.", rich_help_panel=_DATA),
    ] = None,
    validation_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out rows; else a tenth of --train-file.", rich_help_panel=_DATA),
    ] = None,
    test_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows that are scored once, at the end.", rich_help_panel=_DATA)
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text.", rich_help_panel=_DATA)] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of the second text, for pairs.", rich_help_panel=_DATA)
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.", rich_help_panel=_DATA)] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(
            help="Of --train-file: regression, single_label or multi_label. [default: by its labels]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help="Of CSV or TSV: a character, tab or semicolon. [default: by their rows]", rich_help_panel=_DATA
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Of your own files. [default: UTF-8, UTF-16 by its mark, else cp1252]", rich_help_panel=_DATA
        ),
    ] = None,
    max_train_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Use this many training examples.", rich_help_panel=_DATA)
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train on N examples, 1000 steps: the paper's protocol.", rich_help_panel=_DATA),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Cut texts to this many tokens.", rich_help_panel=_DATA)
    ] = None,
    score_on: Annotated[
        str | None,
        typer.Option(
            help="validation, or selection: a tenth of the training data. [default: validation]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the training data. [default: the paper's; 1 for lm]", rich_help_panel=_TRAINING),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after this many steps.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Examples per batch. [default: 16]", rich_help_panel=_TRAINING)
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--gradient-accumulation-steps",
            metavar="N",
            help="Batches that make a step. [default: 1]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory for more time.", rich_help_panel=_TRAINING),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: the recipe's]", rich_help_panel=_TRAINING)
    ] = None,
    lr_scheduler_type: Annotated[
        str | None,
        typer.Option(help="linear, cosine, constant, ... [default: linear]", rich_help_panel=_TRAINING),
    ] = None,
    warmup_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps in which the rate rises. [default: the recipe's]", rich_help_panel=_TRAINING
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of AdamW. [default: the recipe's]", rich_help_panel=_TRAINING)
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help='How much examples of each class count: balanced, or "spam=3,ham=1".',
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    label_smoothing_factor: Annotated[
        float | None,
        typer.Option(help="Share of the target spread over all classes. [default: 0]", rich_help_panel=_TRAINING),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Score the selection part, and save, every N steps. [default: ten times]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Stop when N such scores in a row bring nothing better.", rich_help_panel=_TRAINING
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialisation and order. [default: 42]", rich_help_panel=_TRAINING)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. [default: fp32]", rich_help_panel=_TRAINING)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or mps. [default: the accelerator, else cpu]", rich_help_panel=_TRAINING),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile", help="Run the model through torch.compile.", rich_help_panel=_TRAINING),
    ] = None,
    cache_frozen_layers: Annotated[
        bool | None,
        typer.Option(
            "--cache-frozen-layers",
            help="Run layers below the lowest adapter once per example.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Hyperparameters: best or paper. [default: best]", rich_help_panel=_METHOD)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the method; may be repeated.", rich_help_panel=_METHOD
        ),
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
    spt: Annotated[
        bool | None,
        typer.Option("--spt", help="Make attention and FFNs sparse before fine-tuning.", rich_help_panel=_SPT),
    ] = None,
    spt_set: Annotated[
        list[str] | None,
        typer.Option("--spt-set", metavar="KEY=VALUE", help="A setting of SptConfig.", rich_help_panel=_SPT),
    ] = None,
    save_dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the saved weights: fp32, bf16, fp16 or int8. [default: as trained]", rich_help_panel=_OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a run in the output folder, once this one is finished.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Trackers: tensorboard, wandb, ... [default: none; history.jsonl anyway]",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload the finished run, as `sparsepeft push` does.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository on the hub private.", rich_help_panel=_OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure a few steps, say what would be done, write nothing.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=_OUTPUT)] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON with these options; flags win.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Train a task's adapter, choose the best checkpoint on a tenth of the training data, score it once.

    An interrupted run goes on when the same command is given again, with the same data.

    With `--task lm`: fine-tune a language model on plain text and measure its perplexity. With `--spt` the model is
    made sparse before the adapter is put on.

    Example: `sparsepeft train --task topics --output-dir out/topics --epochs 5`

    Example: `sparsepeft train --train-file mails.csv --class-weights balanced --output-dir out/mails`

    Example: `sparsepeft train --task lm --model MODEL --text mine.txt --spt --output-dir out/mine`
    """
    flags: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_IN_CONFIG}
    from sparsepeft.training.early import check_early

    check_early(flags, config, overwrite)
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.training import load_config, parse_settings, train
    from sparsepeft_cli.terminal.console import print_json
    from sparsepeft_cli.terminal.progress import TrainingProgress
    from sparsepeft_cli.terminal.summary import print_summary

    flags = {key: _plain(value) for key, value in flags.items()}
    flags["settings"] = parse_settings(set_ or [])
    flags["spt_set"] = parse_settings(spt_set, "--spt-set", "num_active_blocks=6") if spt_set else None
    if push_to_hub is not None:
        from sparsepeft.runs.pushing import check_repo_id

        check_repo_id(push_to_hub)
    keep_freed_memory()
    run = load_config(flags, config)
    if dry_run:
        _dry_run(run, overwrite, json)
        return
    with TrainingProgress() as progress:
        results = train(run, callbacks=progress.callbacks, overwrite=overwrite, announce=progress.announce)
    if json:
        print_json(results)
    else:
        print_summary(results, run.output_dir)
    if push_to_hub is not None:
        from sparsepeft_cli import push

        push.command(Path(run.output_dir), push_to_hub, private)


def _dry_run(config: RunConfig, overwrite: bool, json: bool) -> None:
    from sparsepeft.training.dry_run import dry_run
    from sparsepeft_cli.terminal.console import err, print_json
    from sparsepeft_cli.terminal.summary import print_plan

    with err.status("measuring a few steps"):
        plan = dry_run(config, overwrite)
    if json:
        print_json(plan)
    else:
        print_plan(plan)


def _plain(value: Any) -> Any:
    """Paths as strings, as configs have them; None for an option that was not given once."""
    if isinstance(value, list):
        return [_plain(each) for each in value] or None
    return str(value) if isinstance(value, Path) else value
