"""``transformers.Trainer`` that stops at a diverged loss and never leaves a broken checkpoint."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from sparsepeft.devices import find_device
from sparsepeft.errors import Diverged, RunFailed, UserError
from sparsepeft.methods.recipes import Recipe
from sparsepeft.training.caching import STATES, FrozenLayerCache
from sparsepeft.training.loss import TaskLoss

logger = logging.getLogger(__name__)
_LITTLE = 1 << 20  # bytes


class SafeTrainer(Trainer):
    """A Trainer whose last good checkpoint survives a NaN loss and a full disk.

    Args:
        cache: outputs of the frozen layers, which the batches of a :class:`CachingCollator` start from.
        *args, **kwargs: of ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, cache: FrozenLayerCache | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, from the cached states where a batch has them."""
        if self.cache is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.cache.using(inputs.pop(STATES, None)):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; the checkpoint of a last step is taken as it is, where Trainer would do a step more."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                else:
                    self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

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

    def _what_is_left(self) -> str:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {last.name}." if last else "no checkpoint had been written yet."


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``: one whose weights can be read and whose state was written."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if (path / "trainer_state.json").is_file() and _has_weights(path):
            return path
    return None


def resumable(folder: Path) -> str | None:
    """The newest complete checkpoint in ``folder``, for a trainer to go on from; None if there is none."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return None
    logger.info("Resuming from %s.", checkpoint.name)
    return str(checkpoint)


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping that a run which is resumed after it had stopped remembers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the checkpoint said."""
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


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


def training_arguments(
    folder: Path,
    recipe: Recipe,
    *,
    total_steps: int,
    save_steps: int,
    seed: int,
    precision: str,
    device: torch.device,
    gradient_checkpointing: bool,
    **own: Any,
) -> TrainingArguments:
    """What all runs have in common.

    Args:
        folder: of the checkpoints.
        recipe: hyperparameters.
        total_steps: of the run, for the warm-up.
        save_steps: between two checkpoints.
        seed: of order and dropout.
        precision: fp32, bf16 or fp16.
        device: where to train.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        **own: further arguments of ``transformers.TrainingArguments``.
    """
    checkpointing: dict[str, Any] = {}
    if gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        warmup_steps=int(recipe.warmup_ratio * total_steps),
        lr_scheduler_type=recipe.lr_scheduler_type,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=max(1, min(save_steps, 50)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # SafeTrainer looks at every loss itself
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.type == "cuda",
        restore_callback_states_from_checkpoint=True,  # for how long there has been no better score
        **checkpointing,
        **own,
    )


def _has_weights(folder: Path) -> bool:
    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                opened.keys()
    except (OSError, SafetensorError):
        return False
    return bool(files)
