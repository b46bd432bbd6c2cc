"""Fine-tuning a language model, dense or sparse, from a config to weights and perplexity in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsepeft.backbones import backbone_of_run, describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED, write_json
from sparsepeft.inference.encoding import longest_input
from sparsepeft.methods.language_models import (
    CALIBRATION_BLOCKS,
    add_adapter,
    count_trained,
    load_language_model,
    load_trained_language_model,
    perplexity,
)
from sparsepeft.methods.models import (
    Model,
    adapter_config,
    backbone_bytes,
    fingerprint_of,
    load_tokenizer,
    to_accelerator,
)
from sparsepeft.methods.recipes import Recipe
from sparsepeft.methods.sparse import describe, make_sparse
from sparsepeft.provenance import environment
from sparsepeft.runs.card import write_model_card
from sparsepeft.runs.corpus import (
    Corpus,
    begin_token,
    cut,
    evenly_spaced,
    fingerprints,
    join,
    load_corpus,
    num_predicted,
    read_documents,
)
from sparsepeft.runs.files import (
    CHECKPOINTS,
    RESULTS,
    RESULTS_VERSION,
    describe_run,
    open_run,
    read_run,
    write_weights,
)
from sparsepeft.runs.held_out import not_held_out_any_more, read_held_out, write_held_out
from sparsepeft.runs.lm_config import LM, LanguageModelConfig
from sparsepeft.runs.output_folder import HISTORY, LOGS
from sparsepeft.training.outcome import hyperparameters
from sparsepeft.training.plan import Announcer, RunPlan
from sparsepeft.training.recorder import Recorder
from sparsepeft.training.reporting import make_reporters
from sparsepeft.training.trainer import SafeTrainer, resumable, training_arguments, training_device

_NUM_CHECKPOINTS = 10
_EPOCHS = 1


def train_language_model(
    config: LanguageModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
    announce: Callable[[RunPlan], None] = lambda plan: None,
) -> dict[str, Any]:
    """Make the model sparse if that is asked for, fine-tune it, measure its perplexity, save.

    Documents are joined with the end-of-text token and cut into blocks, each a row of its own that begins with the
    begin-of-text token (see :mod:`sparsepeft.runs.corpus`). Perplexity on the
    validation blocks is measured before and after; before also of the dense model, so that what the conversion alone
    does can be seen. The output folder then holds the weights (for adapters: adapter, routers and codebooks only),
    ``run.json`` and ``results.json``. They come there together, when the run is finished; an interrupted run goes on
    when it is started again with the same config and text.

    Args:
        config: what to do.
        callbacks: shown the loss as it comes.
        overwrite: take the place of another run in the output folder, which stays as it is until this one is finished.
        announce: told what the run is about to do, when all is loaded.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UserError: something given cannot be used.
        RunFailed: the loss diverged, or a file could not be written; the last good checkpoint is left.
    """
    folder, recipe, spt = Path(config.output_dir), config.recipe_values(), config.spt_config()
    adapter_config(config.method, recipe.adapter, task_type=TaskType.CAUSAL_LM)  # wrong settings are found first
    training_device(config.device)  # one that is not there is found before anything is loaded
    reporters = make_reporters(config.report_to, folder / UNFINISHED / LOGS)
    run = describe_run(config, recipe)
    with open_run(folder, run, overwrite) as begin:
        model_id = resolve_model(config.model)
        tokenizer = load_tokenizer(model_id)
        model_config = AutoConfig.from_pretrained(model_id)
        block_length = longest_input(tokenizer, model_config, config.block_length, "block_length")
        corpus = _corpus(config, tokenizer, block_length, begin_token(tokenizer, config.bos_token))
        backbone, _ = load_language_model(model_id)
        to_accelerator(backbone, config.device)

        def measure(model: torch.nn.Module) -> dict[str, float]:
            return perplexity(model, corpus.validation, recipe.batch_size, config.precision)

        run |= fingerprint_of(backbone, config.method)
        before = {"dense": measure(backbone)}
        done = None
        if spt is not None:
            done = make_sparse(backbone, spt, evenly_spaced(corpus.train, CALIBRATION_BLOCKS))
            before["sparse"] = measure(backbone)
        set_seed(config.seed)
        model = add_adapter(backbone, config.method, recipe)
        data_fingerprints = fingerprints([*config.text, *config.validation_text])
        work = begin(run | {"task": LM, "data_fingerprints": data_fingerprints, "bos_token_id": corpus.begin})
        if corpus.held_out:
            write_held_out(work, {"validation": list(corpus.held_out)})
        sizes = {"training": len(corpus.train), "validation": len(corpus.validation)}
        announcer = Announcer(
            announce, config, model=describe_backbone(model_id), sizes=sizes, notes=tuple(corpus.notes)
        )
        watching = [announcer, Recorder(work / HISTORY), *reporters, *callbacks]
        start = time.perf_counter()
        trainer = _train(model, config, recipe, corpus, watching, work / CHECKPOINTS)
        seconds = time.perf_counter() - start
        metrics = {"validation": measure(model)}
        results = {
            "format_version": RESULTS_VERSION,
            "task": LM,
            "method": config.method,
            "recipe": config.recipe,
            "seed": config.seed,
            "score": metrics["validation"]["perplexity"],
            "score_split": "validation",
            "main_metric": "perplexity",
            "metrics": metrics,
            "before": before,
            "spt": None if done is None else describe(done),
            "parameters": count_trained(model),
            "saved_bytes": write_weights(work, model, tokenizer, None),
            "model_bytes": backbone_bytes(model),
            "model": describe_backbone(model_id),
            "block_length": block_length,
            "bos_token": None if corpus.begin is None else tokenizer.convert_ids_to_tokens(corpus.begin),
            "num_train_tokens": num_predicted(corpus.train),
            "num_validation_tokens": num_predicted(corpus.validation),
            "train_seconds": round(seconds, 1),
            "steps": int(trainer.state.global_step),
            "hyperparameters": hyperparameters(config, recipe, trainer, block_length=block_length),
            "environment": environment(),
            "notes": list(corpus.notes),
            "data_fingerprints": data_fingerprints,
            "config": {
                key: value
                for key, value in config.to_dict().items()
                if key not in ("output_dir", "model", "text", "validation_text", "device", "report_to")
            },
        }
        write_json(work / RESULTS, results)
        write_model_card(work)
    return results


def evaluate_language_model(
    folder: str | Path,
    model: str | None = None,
    *,
    test_file: str | None = None,
    device: str | None = None,
    text_column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> tuple[dict[str, dict[str, float]], tuple[str, ...], dict[str, str]]:
    """Perplexity of a run's model on its validation text, or on a file.

    Args:
        folder: the output folder of ``sparsepeft train --task lm``.
        model: the backbone, if it has moved since.
        test_file: measure on this text instead.
        device: where to compute; None is the accelerator, if there is one.
        text_column, delimiter, encoding: of ``test_file``; by default the training text's column and encoding.

    Returns:
        The metrics by name of the part, notes on the text, and SHA-256 of its files by name.

    Raises:
        UserError: the folder holds no finished training, files are damaged or missing, the backbone is another, or it
            cannot be told any more which text was trained on.
    """
    folder = Path(folder)
    run = read_run(folder)
    config = LanguageModelConfig(**run["config"])
    files = [*config.text, *config.validation_text] if test_file is None else [test_file]
    held_out, notes = _held_out_text(folder, config, run) if test_file is None else (None, ())
    documents = (
        []
        if test_file is None
        else read_documents(files, text_column or config.text_column, delimiter, encoding or config.encoding)
    )
    home = str(folder) if config.method == "full" else backbone_of_run(folder, model, config.model)
    trained = load_trained_language_model(folder, config, home, backbone_fingerprint=run.get("backbone_fingerprint"))
    to_accelerator(trained, device)
    tokenizer = load_tokenizer(home)
    block_length = longest_input(tokenizer, trained.config, config.block_length, "block_length")
    # A run of an earlier version says nothing of the token that blocks begin with, and had none.
    begin, digests = run.get("bos_token_id"), fingerprints(files)
    if test_file is None:
        corpus = _corpus(config, tokenizer, block_length, begin, held_out)
        blocks, notes = corpus.validation, (*corpus.notes, *notes)
    else:
        blocks = cut(join(documents, tokenizer), block_length, "text of `test_file`", begin)
        if set(digests.values()) & set(_digests_of_training(config, run)):
            notes = (f"{Path(test_file).name} was trained on: its perplexity says nothing about new text",)
    measured = perplexity(trained, blocks, config.recipe_values().batch_size, config.precision)
    return {"validation" if test_file is None else "test": measured}, notes, digests


def _digests_of_training(config: LanguageModelConfig, run: dict[str, Any]) -> list[str]:
    """SHA-256 of the files that were trained on, which come before those of validation text."""
    return list((run.get("data_fingerprints") or {}).values())[: len(config.text)]


def _held_out_text(
    folder: Path, config: LanguageModelConfig, run: dict[str, Any]
) -> tuple[list[str] | None, tuple[str, ...]]:
    """Digests of held-out documents where they must be looked for, and notes."""
    files = [*config.text, *config.validation_text]
    for file in files:
        if not Path(file).exists():
            raise UserError(
                f"The run in {folder} was trained with the file {file}, which is not there any more; put it back, or "
                "measure on other text by `test_file`."
            )
    before = run.get("data_fingerprints") or {}
    changed = [name for name, digest in fingerprints(files).items() if before and digest not in before.values()]
    if not changed:
        return None, ()
    names = ", ".join(changed)
    if config.validation_text:
        return None, (f"{names} {'has' if len(changed) == 1 else 'have'} changed since training",)
    held_out = read_held_out(folder).get("validation")
    if not held_out:
        raise not_held_out_any_more(folder, names, is_known=False)
    return held_out, ()


def _corpus(
    config: LanguageModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    begin: int | None,
    held_out: Sequence[str] | None = None,
) -> Corpus:
    return load_corpus(
        config.text,
        config.validation_text,
        tokenizer,
        block_length,
        config.text_column,
        begin,
        held_out=held_out,
        delimiter=config.delimiter,
        encoding=config.encoding,
    )


def _train(
    model: Model,
    config: LanguageModelConfig,
    recipe: Recipe,
    corpus: Corpus,
    callbacks: list[TrainerCallback],
    folder: Path,
) -> SafeTrainer:
    """Fine-tune in place, with checkpoints in ``folder``; the trainer that did."""
    trainer = SafeTrainer(
        model=model,
        args=_arguments(config, recipe, len(corpus.train), folder),
        train_dataset=[{"input_ids": block, "labels": block} for block in corpus.train],
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resumable(folder))
    return trainer


def _arguments(config: LanguageModelConfig, recipe: Recipe, num_blocks: int, folder: Path) -> TrainingArguments:
    epochs = config.epochs or recipe.epochs or _EPOCHS
    steps_per_epoch = -(-num_blocks // (recipe.batch_size * config.gradient_accumulation_steps))
    total = config.max_steps or max(1, int(steps_per_epoch * epochs))
    return training_arguments(
        folder,
        recipe,
        total_steps=total,
        save_steps=max(1, -(-total // _NUM_CHECKPOINTS)),
        seed=config.seed,
        precision=config.precision,
        num_train_epochs=float(epochs),
        max_steps=config.max_steps or -1,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        device=training_device(config.device),
    )
