"""``sparsepeft train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft_cli.terminal import options

if TYPE_CHECKING:
    from sparsepeft.training import RunConfig

# By section of the help: an option's type, what it does, and what else typer is told.
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "Data": {
        "task": (
            str,
            "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, bbc-news, goemotions, wnut17 (entities), topics "
            "(comes with the package), custom with --train-file, lm with --text.",
        ),
        "data_dir": (
            Path,
            "Folder with the tasks' files. [default: $SPARSEPEFT_DATA, else the hub]",
            {"metavar": "DIR", "envvar": "SPARSEPEFT_DATA", "show_envvar": False},
        ),
        "train_file": (Path, "Your own CSV, TSV, JSONL, JSON, parquet or CoNLL."),
        "validation_file": (Path, "Held-out rows; else a tenth of the training rows."),
        "test_file": (Path, "Rows that are scored once, at the end."),
        "text_column": (str, "Column of the text."),
        "text_pair_column": (str, "Column of the second text, for pairs."),
        "label_column": (str, "Column of the label, or columns of 0 and 1: joy,anger."),
        "problem_type": (
            str,
            "Of own files: regression, single_label, multi_label or token_classification. [default: by their labels]",
        ),
        "delimiter": (str, "Of CSV or TSV: a character, tab or semicolon. [default: by their rows]"),
        "encoding": (str, "Of own files. [default: UTF-8, UTF-16 by its mark, else cp1252]"),
        "max_train_samples": (int, "Use this many training examples."),
        "few_shot": (int, "Train on N examples, 1000 steps: the paper's protocol."),
        "max_length": (int, "Cut texts to this many tokens; sentences with tags are read in parts."),
        "score_on": (str, "validation, or selection: a tenth of the training data. [default: validation]"),
    },
    "Output": {
        "output_dir": (Path, "Folder for weights and results. [required]", {"metavar": "DIR"}),
        "save_dtype": (str, "Dtype of the saved weights: fp32, bf16, fp16 or int8. [default: as trained]"),
        "overwrite": (bool, "Replace a run in the output folder, once this one is finished."),
        "report_to": (
            list[str],
            "Trackers: tensorboard, wandb, ... [default: none; history.jsonl anyway]",
            {"metavar": "NAMES"},
        ),
        "push_to_hub": (str, "Upload the finished run, as `sparsepeft push` does.", {"metavar": "REPO"}),
        "private": (bool, "Make a new repository on the hub private."),
        "dry_run": (bool, "Measure a few steps, say what would be done, write nothing."),
        "json": (bool, "Print the results as JSON."),
        "config": (Path, "YAML or JSON with these options; flags win."),
    },
    "Model and method": {
        "method": (str, "spartan, pfeiffer, houlsby, lora, ia3, bitfit, head or full. [default: spartan; lora for lm]"),
        "model": (str, "Hub id or local folder. [default: the bundled MiniLM]"),
        "recipe": (str, "Hyperparameters: best or paper. [default: best]"),
        "set_": (list[str], "A setting of the method; may be repeated.", {"metavar": "KEY=VALUE"}),
    },
    "Training": {
        "epochs": (float, "Passes over the training data. [default: the paper's; 1 for lm]"),
        "max_steps": (int, "Stop after this many steps."),
        "batch_size": (int, "Examples per batch. [default: 16]"),
        "gradient_accumulation_steps": (int, "Batches that make a step. [default: 1]"),
        "gradient_checkpointing": (bool, "Less memory for more time."),
        "learning_rate": (float, "Peak learning rate. [default: the recipe's]"),
        "lr_scheduler_type": (str, "linear, cosine, constant, ... [default: linear]"),
        "warmup_ratio": (float, "Share of the steps in which the rate rises. [default: the recipe's]"),
        "weight_decay": (float, "Of AdamW. [default: the recipe's]"),
        "class_weights": (
            str,
            'How much examples of each class count: balanced, or "spam=3,ham=1".',
            {"metavar": "WEIGHTS"},
        ),
        "thresholds": (
            str,
            "Of several labels: the probability above which each holds, such as 0.5. [default: selection: chosen on a "
            "tenth of the training data]",
        ),
        "label_smoothing_factor": (float, "Share of the target spread over all classes. [default: 0]"),
        "eval_steps": (int, "Score the selection part, and save, every N steps. [default: ten times]"),
        "early_stopping_patience": (int, "Stop when N such scores in a row bring nothing better."),
        "seed": (int, "Seed of initialisation and order. [default: 42]"),
        "precision": (str, "fp32, bf16 or fp16. [default: fp32]"),
        "device": (str, "cpu, cuda or mps. [default: the accelerator, else cpu]"),
        "compile": (bool, "Run the model through torch.compile."),
        "cache_frozen_layers": (bool, "Run layers below the lowest adapter once per example."),
    },
    "Language models (--task lm)": {
        "text": (list[Path], "Training text: .txt, .jsonl, .csv or .tsv; may be repeated."),
        "validation_text": (list[Path], "Held-out text; else a tenth of --text."),
        "block_length": (int, "Tokens per example. [default: the model's, at most 512]"),
        "bos_token": (
            bool,
            "Begin each example with the begin-of-text token. [default: if the tokenizer does so by itself]",
            {"flag": "--bos-token/--no-bos-token"},
        ),
    },
    "Sparse models (SPT)": {
        "spt": (bool, "Make attention and FFNs sparse before fine-tuning."),
        "spt_set": (list[str], "A setting of SptConfig.", {"metavar": "KEY=VALUE"}),
    },
}
_NOT_IN_CONFIG = ("set_", "config", "overwrite", "json", "dry_run", "push_to_hub", "private")


@options.renamed({"--gradient-accumulation": "--gradient-accumulation-steps"})
def command(**flags: Any) -> None:
    """Train a task's adapter, choose the best checkpoint on a tenth of the training data, score it once.

    An interrupted run goes on when the same command is given again, with the same data.

    With `--task lm`: fine-tune a language model on plain text and measure its perplexity. With `--spt` the model is
    made sparse before the adapter is put on.

    Example: `sparsepeft train --task topics --output-dir out/topics --epochs 5`

    Example: `sparsepeft train --train-file mails.csv --class-weights balanced --output-dir out/mails`

    Example: `sparsepeft train --task lm --model MODEL --text mine.txt --spt --output-dir out/mine`
    """
    set_, config, overwrite, json, dry_run, push_to_hub, private = map(flags.pop, _NOT_IN_CONFIG)
    from sparsepeft.training.early import check_early

    check_early(flags, config, bool(overwrite))
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.launch import is_first, num_processes
    from sparsepeft.training import load_config, parse_settings, train
    from sparsepeft_cli.terminal.console import err, out, print_json
    from sparsepeft_cli.terminal.progress import TrainingProgress
    from sparsepeft_cli.terminal.summary import print_summary

    flags = {key: _plain(value) for key, value in flags.items()}
    flags["settings"] = parse_settings(set_ or [])
    if flags["spt_set"]:
        flags["spt_set"] = parse_settings(flags["spt_set"], "--spt-set", "num_active_blocks=0.25")
    if push_to_hub is not None:
        from sparsepeft.runs.pushing import check_repo_id

        check_repo_id(push_to_hub)
    keep_freed_memory()
    run = load_config(flags, config)
    if dry_run:
        if is_first():
            _dry_run(run, bool(overwrite), json)
        return
    with TrainingProgress() as progress:
        results = train(run, callbacks=progress.callbacks, overwrite=bool(overwrite), announce=progress.announce)
    if is_first():
        if json:
            print_json(results)
        else:
            print_summary(results, run.output_dir)
        if push_to_hub is not None:
            from sparsepeft_cli import push

            url = push.upload(Path(run.output_dir), push_to_hub, bool(private))
            console = err if json else out
            console.print(url, highlight=False, soft_wrap=True)
    if num_processes() > 1:
        from sparsepeft.training.processes import leave

        leave()


for _title, _section in OPTIONS.items():
    options.declare(command, options.section(_title, _section))


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
