"""A training run from a config to weights and results in a folder."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.extras import require
from sparsepeft.folders import UNFINISHED, write_json
from sparsepeft.inference.encoding import Collator, encode, longest_input
from sparsepeft.methods.models import (
    adapter_config,
    backbone_bytes,
    count_parameters,
    extend,
    fingerprint_of,
    load_backbone,
    load_tokenizer,
    note_on_head,
    to_accelerator,
)
from sparsepeft.methods.recipes import Recipe
from sparsepeft.methods.sparse import count_routers, describe, make_sparse
from sparsepeft.provenance import OtherLoad, environment
from sparsepeft.runs.card import write_model_card
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import (
    CHECKPOINTS,
    RESULTS,
    describe_run,
    open_run,
    results_of,
    scored_part,
    write_weights,
)
from sparsepeft.runs.held_out import save_held_out
from sparsepeft.runs.output_folder import HISTORY, LOGS
from sparsepeft.tasks import TaskData, TaskSpec, few_shot, load_task, split_train, subsample
from sparsepeft.training.caching import CachingCollator, FrozenLayerCache
from sparsepeft.training.loss import check_loss, task_loss
from sparsepeft.training.outcome import describe_scores, hyperparameters
from sparsepeft.training.plan import Announcer, RunPlan
from sparsepeft.training.recorder import Recorder
from sparsepeft.training.reporting import make_reporters
from sparsepeft.training.trainer import EarlyStopping, SafeTrainer, resumable, training_arguments, training_device

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FEW_SHOT_STEPS = 1000  # the paper's appendix B
_SPLIT_SEED = 42  # the part of the training data that models are chosen on is the same in every run
NUM_EVALUATIONS = 10
_CALIBRATION_EXAMPLES = 64
MAX_SELECTION = 1000  # examples that hyperparameters are chosen on; a tenth of SST-2 alone would be 6,735


@dataclass(frozen=True)
class PreparedData:
    """Encoded parts of a task: what is trained on, what the best checkpoint is chosen on, what is reported."""

    train: Dataset
    selection: Dataset | None
    reported: dict[str, Dataset]
    num_cut: int

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each part, those that are trained on first."""
        chosen_on = {} if self.selection is None else {"selection": len(self.selection)}
        return {"training": len(self.train), **chosen_on, **{name: len(part) for name, part in self.reported.items()}}


def train(
    config: RunConfig,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
    announce: Callable[[RunPlan], None] = lambda plan: None,
) -> dict[str, Any]:
    """Train, choose the best checkpoint on a tenth of the training data, save, score what was saved once.

    With ``spt`` the model is made sparse first, calibrated on a few of the training examples. The output folder then
    holds the weights (for adapters: adapter and head only), ``run.json`` (the resolved config) and ``results.json``.
    They come there together, when the run is finished; until then it works in a part of the folder. A run that was
    interrupted goes on from its last complete checkpoint when it is started again with the same config and data.

    Args:
        config: what to do.
        callbacks: shown loss and metrics as they come.
        overwrite: take the place of another run in the output folder, which stays as it is until this one is finished.
        announce: told what the run is about to do, when all is loaded.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UserError: something given cannot be used (see :mod:`sparsepeft.tasks` for data).
        RunFailed: the loss diverged, or a file could not be written; the last good checkpoint is left.
    """
    require("datasets", "train", "Training").disable_progress_bars()
    folder, recipe, spt = Path(config.output_dir), config.recipe_values(), config.spt_config()
    adapter_config(config.method, recipe.adapter)  # wrong settings are found before data and weights are read
    training_device(config.device)  # one that is not there is found before anything is loaded
    reporters = make_reporters(config.report_to, folder / UNFINISHED / LOGS)
    run = describe_run(config, recipe)
    with open_run(folder, run, overwrite) as begin:
        model_id = resolve_model(config.model)
        data = load_data(config)
        check_loss(data.spec, config.class_weights, config.label_smoothing_factor)
        tokenizer = load_tokenizer(model_id)
        set_seed(config.seed)
        backbone = load_backbone(model_id, data.spec)
        data = dataclasses.replace(data, notes=(*data.notes, *note_on_head(model_id, data.spec)))
        max_length = longest_input(tokenizer, backbone.config, config.max_length)
        if max_length <= (special := tokenizer.num_special_tokens_to_add(data.spec.is_pair)):
            raise UserError(
                f"`max_length={max_length}` was given, but the tokenizer adds {special} special tokens to each input, "
                "which leaves no room for text; pass more."
            )
        prepared = prepare_data(data, config, tokenizer, max_length)
        loss = task_loss(
            data.spec,
            prepared.train["labels"],
            config.class_weights,
            config.label_smoothing_factor,
            config.gradient_accumulation_steps,
        )
        collator = Collator(tokenizer)
        done = None
        run |= fingerprint_of(backbone, config.method)
        if spt is not None:
            to_accelerator(backbone, config.device)
            done = make_sparse(backbone, spt, calibration_batch(prepared.train, collator))
        model = extend(backbone, config.method, data.spec, recipe.adapter)
        run |= {"task": vars(data.spec), "data_fingerprints": dict(data.fingerprints)}
        run |= {} if data.columns is None else {"columns": data.columns._asdict()}
        work = begin(run)
        save_held_out(work, data)
        start, others = time.perf_counter(), OtherLoad()
        cache, training = None, prepared.train
        if config.cache_frozen_layers:
            cache = FrozenLayerCache(model, work / CHECKPOINTS / "frozen_layers.bin")
            training = cache.fill(prepared.train, collator)
            collator = CachingCollator(collator, cache)
        announcer = Announcer(
            announce, config, model=describe_backbone(model_id), sizes=prepared.sizes, notes=data.notes
        )
        trainer = SafeTrainer(
            model=model,
            args=_arguments(config, recipe, data.spec.paper_epochs, prepared, work / CHECKPOINTS),
            train_dataset=training,
            eval_dataset=prepared.selection,
            data_collator=collator,
            processing_class=tokenizer,
            compute_metrics=lambda output: _metrics(data.spec, output),
            compute_loss_func=loss,
            callbacks=[announcer, Recorder(work / HISTORY), *reporters, *callbacks, *_early_stopping(config)],
            cache=cache,
        )
        trainer.remove_callback(PrinterCallback)
        parameters = count_parameters(model)
        with cache.attached() if cache else nullcontext():
            trainer.train(resume_from_checkpoint=resumable(work / CHECKPOINTS))
        seconds, others_share = time.perf_counter() - start, others.share()

        saved = write_weights(work, model, tokenizer, config.save_dtype)
        metrics, answers = {}, {}
        for name, part in prepared.reported.items():
            output = trainer.predict(part)
            answers[name] = _logits(output.predictions), np.asarray(output.label_ids)
            metrics[name] = data.spec.compute_metrics(*answers[name])
        scored = scored_part(metrics)
        results = results_of(
            config,
            data,
            metrics,
            **describe_scores(data.spec, *answers[scored], np.asarray(prepared.train["labels"])),
            problem_type=data.spec.problem_type,
            num_texts=len(data.spec.text_columns),
            num_rows=prepared.sizes,
            hyperparameters=hyperparameters(config, recipe, trainer, data.spec.label_names, max_length=max_length),
            parameters=parameters,
            saved_bytes=saved,
            model_bytes=backbone_bytes(model),
            model=describe_backbone(model_id),
            num_train=len(prepared.train),
            num_cut=prepared.num_cut,
            train_seconds=round(seconds, 1),
            others_cpu_share=others_share,
            steps=trainer.state.global_step,
            best_step=trainer.state.best_global_step,
            selection_score=trainer.state.best_metric,
            environment=environment(),
        )
        formula = getattr(model.peft_config["default"], "formula", None) if isinstance(model, PeftModel) else None
        if formula is not None:
            results["formula"] = formula
        if done is not None:
            results["spt"] = describe(done)
            parameters["routers"] = count_routers(model)
        write_json(work / RESULTS, results)
        write_model_card(work)
    return results


def load_data(config: RunConfig) -> TaskData:
    """The task's datasets, from where the config says."""

    def path(value: str | None) -> Path | None:
        return Path(value) if value else None

    return load_task(
        config.task,
        data_dir=path(config.data_dir),
        train_file=path(config.train_file),
        validation_file=path(config.validation_file),
        test_file=path(config.test_file),
        text_column=config.text_column,
        text_pair_column=config.text_pair_column,
        label_column=config.label_column,
        problem_type=config.problem_type,
        delimiter=config.delimiter,
        encoding=config.encoding,
    )


def prepare_data(
    data: TaskData, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreparedData:
    """Split, subsample and encode. Few-shot runs use every example for training and take the last step's weights."""
    spec = data.spec
    training, selection = split_train(data.train, spec, seed=_SPLIT_SEED)
    selecting = config.score_on == "selection"
    if config.few_shot is not None:
        training = few_shot(training if selecting else data.train, spec, config.few_shot, config.seed)
    elif config.max_train_samples is not None:
        # The tenth is cut from what is used, so that N samples cost N samples.
        used = subsample(data.train, config.max_train_samples, _SPLIT_SEED)
        training, selection = split_train(used, spec, seed=_SPLIT_SEED)
    parts = {"train": training}
    if selecting:
        parts["selection"] = subsample(selection, MAX_SELECTION, _SPLIT_SEED)
    else:
        parts |= {"validation": data.validation, **data.extra}
        if data.test is not None:
            parts["test"] = data.test
        if config.few_shot is None:
            parts["selection"] = selection
    num_cut = 0
    encoded = {}
    for name, part in parts.items():
        encoded[name], cut = encode(part, spec, tokenizer, max_length)
        num_cut += cut
    if num_cut:
        logger.warning("%d texts are longer than %d tokens and were cut to that length.", num_cut, max_length)
    reported = {name: part for name, part in encoded.items() if name != "train" and (selecting or name != "selection")}
    return PreparedData(encoded["train"], None if config.few_shot else encoded["selection"], reported, num_cut)


def calibration_batch(training: Dataset, collator: Collator) -> dict[str, Any]:
    """Up to 64 examples from the whole of the training data, padded to the longest of them."""
    count = min(_CALIBRATION_EXAMPLES, len(training))
    return collator([training[int(index)] for index in np.linspace(0, len(training) - 1, count)])


def _arguments(
    config: RunConfig, recipe: Recipe, task_epochs: int, prepared: PreparedData, checkpoints: Path
) -> TrainingArguments:
    steps_per_epoch = -(-len(prepared.train) // recipe.batch_size // config.gradient_accumulation_steps)
    epochs = config.epochs or recipe.epochs or task_epochs
    max_steps = config.max_steps or (FEW_SHOT_STEPS if config.few_shot and not config.epochs else -1)
    total = max_steps if max_steps > 0 else max(1, int(steps_per_epoch * epochs))
    every = min(total, config.eval_steps or max(1, -(-total // NUM_EVALUATIONS)))
    selecting = prepared.selection is not None
    return training_arguments(
        checkpoints,
        recipe,
        total_steps=total,
        save_steps=every,
        seed=config.seed,
        precision=config.precision,
        device=training_device(config.device),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=float(epochs),
        max_steps=max_steps,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps" if selecting else "no",
        eval_steps=every,
        load_best_model_at_end=selecting,
        metric_for_best_model="score" if selecting else None,
        greater_is_better=True if selecting else None,
        torch_compile=config.compile,
        remove_unused_columns=False,  # the collator takes what it knows
    )


def _early_stopping(config: RunConfig) -> list[TrainerCallback]:
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStopping(early_stopping_patience=patience)]


def _metrics(spec: TaskSpec, output: EvalPrediction) -> dict[str, float]:
    metrics = spec.compute_metrics(_logits(output.predictions), np.asarray(output.label_ids))
    return {**metrics, "score": metrics[spec.main_metric]}


def _logits(predictions: Any) -> np.ndarray:
    """The logits, which some models return with other things."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
