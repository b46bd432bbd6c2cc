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

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.folders import UNFINISHED, write_json
from sparsepeft.inference.encoding import longest_input
from sparsepeft.methods.language_models import (
    CALIBRATION_BLOCKS,
    add_adapter,
    count_trained,
    load_language_model,
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
    evenly_spaced,
    fingerprints,
    load_corpus,
    num_predicted,
)
from sparsepeft.runs.files import (
    CHECKPOINTS,
    RESULTS,
    RESULTS_VERSION,
    describe_run,
    open_run,
    write_weights,
)
from sparsepeft.runs.held_out import write_held_out
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


def _corpus(
    config: LanguageModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    begin: int | None,
) -> Corpus:
    return load_corpus(
        config.text,
        config.validation_text,
        tokenizer,
        block_length,
        config.text_column,
        begin,
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
