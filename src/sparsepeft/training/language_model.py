"""Fine-tuning a language model, dense or sparse, from a config to weights and perplexity in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import AutoConfig, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.provenance import environment, write_json
from sparsepeft.training.card import write_model_card
from sparsepeft.training.encoding import longest_input
from sparsepeft.training.files import (
    CHECKPOINTS,
    RESULTS,
    RESULTS_VERSION,
    check_folder,
    describe_run,
    open_run,
    read_run,
    write_weights,
)
from sparsepeft.training.lm_config import LM, LanguageModelConfig
from sparsepeft.training.lm_data import Corpus, evenly_spaced, fingerprints, load_corpus
from sparsepeft.training.lm_model import (
    CALIBRATION_BLOCKS,
    add_adapter,
    count_trained,
    load_language_model,
    load_trained_language_model,
    perplexity,
)
from sparsepeft.training.methods import Model, adapter_config, backbone_bytes, load_tokenizer, to_accelerator
from sparsepeft.training.outcome import hyperparameters
from sparsepeft.training.plan import Announcer, RunPlan
from sparsepeft.training.recipes import Recipe
from sparsepeft.training.sparse import describe, make_sparse
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

    Documents are joined with the end-of-text token and cut into blocks, each a row of its own. Perplexity on the
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
    device = training_device(config.device)
    run = describe_run(config, recipe)
    check_folder(folder, run, overwrite)
    model_id = resolve_model(config.model)
    corpus, tokenizer, block_length = _corpus(config, model_id)
    backbone, _ = load_language_model(model_id)
    to_accelerator(backbone, device)

    def measure(model: torch.nn.Module) -> dict[str, float]:
        return perplexity(model, corpus.validation, recipe.batch_size, config.precision)

    before = {"dense": measure(backbone)}
    done = None
    if spt is not None:
        done = make_sparse(backbone, spt, evenly_spaced(corpus.train, CALIBRATION_BLOCKS))
        before["sparse"] = measure(backbone)
    set_seed(config.seed)
    model = add_adapter(backbone, config.method, recipe)
    data_fingerprints = fingerprints([*config.text, *config.validation_text])
    with open_run(folder, run | {"task": LM, "data_fingerprints": data_fingerprints}, overwrite) as work:
        start = time.perf_counter()
        sizes = {"training": len(corpus.train), "validation": len(corpus.validation)}
        announcer = Announcer(
            announce, config, model=describe_backbone(model_id), sizes=sizes, notes=tuple(corpus.notes)
        )
        trainer = _train(model, config, recipe, corpus, [announcer, *callbacks], work / CHECKPOINTS)
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
            "num_train_tokens": corpus.train.numel(),
            "num_validation_tokens": corpus.validation.numel(),
            "train_seconds": round(seconds, 1),
            "steps": int(trainer.state.global_step),
            "hyperparameters": hyperparameters(config, recipe, trainer, block_length=block_length),
            "environment": environment(),
            "notes": list(corpus.notes),
            "data_fingerprints": data_fingerprints,
            "config": {
                key: value
                for key, value in config.to_dict().items()
                if key not in ("output_dir", "model", "text", "validation_text", "device")
            },
        }
        write_json(work / RESULTS, results)
        write_model_card(work)
    return results


def evaluate_language_model(folder: str | Path, model: str | None = None) -> dict[str, dict[str, float]]:
    """Perplexity of a run's model on its validation text, by name of the part.

    Args:
        folder: the output folder of ``sparsepeft train --task lm``.
        model: the backbone, if it has moved since.

    Raises:
        UserError: the folder holds no finished training, files are damaged or missing, or the backbone is another.
    """
    folder = Path(folder)
    config = LanguageModelConfig(**read_run(folder)["config"])
    trained = load_trained_language_model(folder, config, model)
    to_accelerator(trained)
    home = str(folder) if config.method == "full" else resolve_model(model or config.model)
    corpus, _, _ = _corpus(config, home)
    batch_size = config.recipe_values().batch_size
    return {"validation": perplexity(trained, corpus.validation, batch_size, config.precision)}


def _corpus(config: LanguageModelConfig, model_id: str) -> tuple[Corpus, Any, int]:
    """Blocks of text, the tokenizer, and the blocks' length."""
    tokenizer = load_tokenizer(model_id)
    length = longest_input(tokenizer, AutoConfig.from_pretrained(model_id), config.block_length, "block_length")
    return load_corpus(config.text, config.validation_text, tokenizer, length, config.text_column), tokenizer, length


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
