"""Fitting a model by ``transformers.Trainer``, which here stops at a diverged loss and leaves no broken checkpoint."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from sparsepeft.devices import find_device
from sparsepeft.errors import Diverged, RunFailed, UserError
from sparsepeft.inference.sentences import SENTENCE, by_sentence
from sparsepeft.launch import is_first, is_sharded, num_processes
from sparsepeft.methods.models import Model, to_accelerator, trained_head, trained_norms
from sparsepeft.methods.recipes import Recipe
from sparsepeft.models import deferred_logits
from sparsepeft.ops.dropout import CompiledDropout, is_compiled_dropout_faster
from sparsepeft.provenance import OtherLoad
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import CHECKPOINTS
from sparsepeft.tasks import TaskSpec
from sparsepeft.training.caching import STATES, CachingCollator, FrozenLayerCache
from sparsepeft.training.checkpoints import has_weights, last_checkpoint
from sparsepeft.training.data import LabelledData, TextData
from sparsepeft.training.loss import TaskLoss, task_loss
from sparsepeft.training.model import RunModel
from sparsepeft.training.processes import first_before_others
from sparsepeft.training.sparse_gradients import SparseGradientTrainer
from sparsepeft.training.thresholds import thresholds_by

logger = logging.getLogger(__name__)

FEW_SHOT_STEPS = 1000  # appendix B of arXiv:2211.16634
NUM_EVALUATIONS = 10
_LM_EPOCHS = 1
_LITTLE = 1 << 20  # bytes


@dataclass(frozen=True)
class Fitted:
    """What fitting leaves, beside the model's weights.

    Attributes:
        trainer: whose model has the weights of the best checkpoint, or of the last step.
        seconds: that it took.
        others_share: of the processors' time that other processes took meanwhile.
    """

    trainer: SafeTrainer
    seconds: float
    others_share: float | None


def fit(
    config: RunConfig, data: LabelledData | TextData, built: RunModel, work: Path, callbacks: Sequence[TrainerCallback]
) -> Fitted:
    """Train a model in place, from its last complete checkpoint in the folder ``work`` if there is one.

    Raises:
        UserError: frozen layers cannot be cached in this model.
        RunFailed: the loss diverged, or a checkpoint could not be written; the last good one is left.
    """
    start, others = time.perf_counter(), OtherLoad()
    checkpoints = work / CHECKPOINTS
    rows, collator, cache = data.train, data.collator, None
    _check_norms(config, built.model)
    scoring: dict[str, Any] = {}
    if isinstance(data, LabelledData):
        if config.cache_frozen_layers:
            if not is_sharded():  # else no process may have room for the whole model
                to_accelerator(built.model, config.device)  # now, as Trainer moves it only after the cache is filled
            cache = FrozenLayerCache(built.model, checkpoints / "frozen_layers.bin")
            with first_before_others():
                rows = cache.fill(data.train, collator, is_filled=not is_first())
            collator = CachingCollator(collator, cache)
        scoring = {
            "eval_dataset": data.selection,
            "processing_class": data.tokenizer,
            "compute_metrics": partial(_score, data.spec, config, data.selection),
            "compute_loss_func": task_loss(data.spec, data.labels, config),
        }
    else:
        rows = [{"input_ids": block, "labels": block} for block in rows]
    patience = config.early_stopping_patience
    early_stopping = [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]
    trainer = SafeTrainer(
        model=built.model,
        args=training_arguments(config, data, checkpoints),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[*callbacks, *early_stopping],
        cache=cache,
        recipe=config.recipe_values(),
        **scoring,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_sharded:
        _check_sharded(config, trainer.accelerator.state.fsdp_plugin)
    with cache.attached() if cache else nullcontext():
        checkpoint = last_checkpoint(checkpoints)
        if checkpoint is not None:
            logger.info("Resuming from %s.", checkpoint.name)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return Fitted(trainer, time.perf_counter() - start, others.share())


def _check_norms(config: RunConfig, model: Model) -> None:
    """Refuse a rate for norms that nobody trains."""
    if config.settings.get("norms_learning_rate") is not None and not trained_norms(model):
        raise UserError(
            f"`norms_learning_rate` was given, but `method={config.method}` trains no normalisation layers here; "
            "leave it out, or set `train_layer_norms=true` with spartan."
        )


def _own_rates(recipe: Recipe, model: Any) -> Iterator[tuple[set[torch.nn.Parameter], float]]:
    """The parameters that have a learning rate of their own, and that; of those in two parts, the last counts."""
    if recipe.norms_learning_rate is not None:
        yield set(trained_norms(model)), recipe.norms_learning_rate
    if recipe.head_learning_rate is not None:
        yield set(trained_head(model)), recipe.head_learning_rate


def _check_sharded(config: RunConfig, plugin: Any) -> None:
    """Refuse what processes with parts of each weight (FSDP) cannot do."""
    if config.save_dtype is not None:
        raise UserError(
            f"`save_dtype={config.save_dtype}` was given to processes with parts of each weight (FSDP); leave it out."
        )
    kind = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"The processes are to save checkpoints in parts ({kind}), which no single one could go on from; set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in the config of accelerate."
        )


class SafeTrainer(SparseGradientTrainer):
    """A Trainer whose last good checkpoint survives a NaN loss and a full disk.

    Args:
        cache: outputs of the frozen layers, which the batches of a :class:`CachingCollator` start from.
        recipe: with the peak learning rates of parts that have one of their own; None without such.
        *args, **kwargs: of ``transformers.Trainer``.
    """

    def __init__(
        self, *args: Any, cache: FrozenLayerCache | None = None, recipe: Recipe | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cache, self.recipe = cache, recipe

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers has it, with further groups for the parameters that have a rate of their own."""
        is_fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        # Of the model as it is now, whose parameters FSDP may have replaced.
        for part, rate in _own_rates(self.recipe, self.model) if is_fresh and self.recipe is not None else ():
            for group in list(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if parameter in part]
                group["params"] = [parameter for parameter in group["params"] if parameter not in part]
                if inside:
                    optimizer.add_param_group({**group, "params": inside, "lr": rate})
        return optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, from the cached states where a batch has them; a language model's without its logits."""
        using = self.cache.using(inputs.pop(STATES, None)) if self.cache else nullcontext()
        with using, deferred_logits(model), CompiledDropout() if self._compiles_dropout() else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; the checkpoint of a last step, early or not, is taken as it is, where Trainer would do a step more."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
            if state.global_step >= state.max_steps or control.get("should_training_stop"):
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                else:
                    self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As transformers has it; by length, with an order that a resumed run meets again."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            size = sampler.batch_size * self.args.world_size  # so that processes share the batches of a single one
            return _ByLength(size, lengths=sampler.lengths, seed=self.args.data_seed or self.args.seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """By length, as transformers does; in order where rows are parts of sentences."""
        if SENTENCE in getattr(eval_dataset, "column_names", ()):
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The batches of a step, and what the sum of their losses is divided by; a TaskLoss counts by its weights."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.compute_loss_func, TaskLoss):
            count = self.compute_loss_func.count([batch["labels"] for batch in samples]).to(device)
            if self.args.world_size > 1:  # as Trainer does with its own count
                count = self.accelerator.gather(count).sum()
        return samples, count

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; raises Diverged where the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}, so training was "
                f"stopped; {self._what_is_left()} Try a lower learning rate."
            )
        return loss

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights (FSDP)."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def whole_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The model's weights where each process has a part of them (FSDP), whole in the first one; else None."""
        if not self.is_sharded:
            return None
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return weights

    def _compiles_dropout(self) -> bool:
        args = self.args
        recomputes = args.torch_compile or args.gradient_checkpointing  # or traces; neither knows the kernels
        return args.device.type == "cpu" and not recomputes and is_compiled_dropout_faster()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        broken = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            raise Diverged(
                f"{broken[0]} holds values that are not finite at step {self.state.global_step}, so training was "
                f"stopped; {self._what_is_left()} Try a lower learning rate."
            )
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            is_full = shutil.disk_usage(folder.parent).free < _LITTLE  # which PyTorch's writer does not say
            shutil.rmtree(folder, ignore_errors=True)
            reason = "no space is left on the disk" if is_full else error
            raise RunFailed(
                f"The checkpoint of step {self.state.global_step} could not be written ({reason}); "
                f"{self._what_is_left()} Free space and repeat the command."
            ) from error

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers has it, but the last checkpoint stays, to go on from until the result is in its place."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, wherever the folder is by now; Trainer would go on without."""
        best = Path(str(self.args.output_dir)) / Path(str(self.state.best_model_checkpoint)).name
        if not has_weights(best):
            raise RunFailed(f"The best checkpoint {best} cannot be read; {self._what_is_left()} Repeat the command.")
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def _what_is_left(self) -> str:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {last.name}." if last else "no checkpoint had been written yet."


class _ByLength(LengthGroupedSampler):
    """Batches of like length, in an order that follows from seed and epoch alone."""

    def __init__(self, batch_size: int, *, lengths: Any, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, resumed ones too."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


def training_device(name: str | None) -> torch.device:
    """Where to train: the device of a name, or for None the accelerator if there is one.

    Raises:
        UserError: there is no such device, or it is not the one that ``transformers.Trainer`` takes.
    """
    device = find_device(name)
    if device.index:
        raise UserError(
            f"`device={name}` was given, but training takes the first that it sees; set CUDA_VISIBLE_DEVICES="
            f"{device.index} and pass `device={device.type}`."
        )
    return device


def training_arguments(config: RunConfig, data: LabelledData | TextData, checkpoints: Path) -> TrainingArguments:
    """What transformers' trainer is told; ``checkpoints`` is their folder."""
    recipe, device = config.recipe_values(), training_device(config.device)
    steps_per_epoch = -(-len(data.train) // (recipe.batch_size * config.gradient_accumulation_steps))
    epochs = (
        config.epochs or recipe.epochs or (data.spec.paper_epochs if isinstance(data, LabelledData) else _LM_EPOCHS)
    )
    max_steps = config.max_steps or (FEW_SHOT_STEPS if config.few_shot and not config.epochs else -1)
    total = max_steps if max_steps > 0 else max(1, int(steps_per_epoch * epochs))
    every = min(total, config.eval_steps or max(1, -(-total // NUM_EVALUATIONS)))
    is_selecting = data.selection is not None
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=float(epochs),
        max_steps=max_steps,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=share_of_batch(recipe.batch_size),
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        train_sampling_strategy="random" if config.is_language_model else "group_by_length",  # blocks are of one length
        warmup_steps=int(recipe.warmup_ratio * total),
        lr_scheduler_type=recipe.lr_scheduler_type,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and num_processes() > 1 else None,
        ddp_find_unused_parameters=None if config.method == "full" else False,  # adapters are used whole
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        torch_compile=config.compile,
        eval_strategy="steps" if is_selecting else "no",
        eval_steps=every,
        load_best_model_at_end=is_selecting,
        metric_for_best_model="score" if is_selecting else None,
        greater_is_better=True if is_selecting else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=max(1, min(every, 50)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # SafeTrainer looks at every loss itself
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.type == "cuda",
        restore_callback_states_from_checkpoint=True,  # for how long there has been no better score
        remove_unused_columns=False,  # the collator takes what it knows
    )


def share_of_batch(batch_size: int) -> int:
    """How many of a batch's examples each process takes.

    Raises:
        UserError: processes would get different numbers.
    """
    share, rest = divmod(batch_size, num_processes())
    if rest:
        raise UserError(
            f"`batch_size={batch_size}` was given to {num_processes()} processes, which share each batch evenly; "
            f"pass a multiple of {num_processes()}."
        )
    return share


def answers_of(output: Any, part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a scored part, those of a sentence together where rows are parts of one.

    Args:
        output: with ``predictions``, which some models return with other things, and ``label_ids``.
        part: the rows, in order.
    """
    predictions = output.predictions
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    labels = np.asarray(output.label_ids)
    if SENTENCE in getattr(part, "column_names", ()):
        return by_sentence(logits, labels, part[SENTENCE][:])
    return logits, labels


def _score(spec: TaskSpec, config: RunConfig, part: Any, output: EvalPrediction) -> dict[str, float]:
    """The metrics that a checkpoint is chosen by.

    Of several labels each is at its best threshold, however rare it is: with one that rare labels share, F1 also says
    how alike their probabilities are, by which early checkpoints would be chosen that have learned nothing yet.
    """
    answer = answers_of(output, part)
    metrics = spec.compute_metrics(*answer, thresholds_by(spec, config, answer, least_positives=1))
    return {**metrics, "score": metrics[spec.main_metric]}
