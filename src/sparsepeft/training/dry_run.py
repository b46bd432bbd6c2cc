"""What a run would do and how long it would take, found out by beginning it where nothing is left of it."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from sparsepeft.methods.saving import write_weights
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import describe_run
from sparsepeft.runs.folder import check_folder
from sparsepeft.training.callbacks import RunPlan, make_reporters
from sparsepeft.training.run import train

_NUM_STEPS = 4  # measured, after a first that is slower
_PASSES = 3  # forward passes that a step takes as long as: its backward pass costs two
_BYTES = {"bfloat16": 2, "float16": 2}


class _Enough(Exception):
    """Ends a run that was only to be measured."""


class _Measure(TrainerCallback):
    """Times the first steps and looks at the model, then ends the run."""

    def __init__(self, folder: Path, save_dtype: str | None) -> None:
        self._folder, self._save_dtype = folder, save_dtype
        self._start = 0.0
        self.seconds: list[float] = []
        self.evaluations = 0
        self.trained = self.saved_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy != "no":
            self.evaluations = state.max_steps // max(1, int(args.eval_steps))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) > _NUM_STEPS or state.global_step >= state.max_steps:
            self.trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            if isinstance(model, PeftModel):
                tokenizer: Any = kwargs.get("processing_class")
                self.saved_bytes = write_weights(self._folder, model, tokenizer, self._save_dtype)
            else:
                size = _BYTES.get(str(self._save_dtype))
                self.saved_bytes = sum(one.numel() * (size or one.element_size()) for one in model.parameters())
            raise _Enough


def dry_run(config: RunConfig, overwrite: bool = False) -> dict[str, Any]:
    """Load and prepare all that a run needs, measure a few steps in a folder that is removed, and add up.

    Args:
        config: of the run; its output folder is looked at and left as it is.
        overwrite: as for the run.

    Returns:
        ``plan`` (a :class:`sparsepeft.training.callbacks.RunPlan` as a dictionary), ``trained_parameters``,
        ``saved_bytes`` of the weights, ``seconds_per_step`` (median), ``estimated_seconds`` of training and scoring,
        without loading.

    Raises:
        UserError, RunFailed: as the run would.
    """
    check_folder(Path(config.output_dir), describe_run(config), overwrite)
    plans: list[RunPlan] = []
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights"
        weights.mkdir()
        measure = _Measure(weights, config.save_dtype)
        make_reporters(config.report_to, weights)  # that they are there; none is told of these steps
        elsewhere = dataclasses.replace(config, output_dir=str(Path(temporary) / "run"), report_to=())
        with contextlib.suppress(_Enough):
            train(elsewhere, callbacks=[measure], announce=plans.append)
    plan = dataclasses.replace(plans[0], folder=Path(config.output_dir))
    step = statistics.median(measure.seconds[1:] or measure.seconds)
    chosen_on = plan.sizes.get("selection", 0) * measure.evaluations
    reported = sum(size for name, size in plan.sizes.items() if name not in ("training", "selection"))
    rows = chosen_on + (reported or plan.sizes.get("selection", 0))
    return {
        "plan": dataclasses.asdict(plan) | {"folder": str(plan.folder), "notes": list(plan.notes)},
        "trained_parameters": measure.trained,
        "saved_bytes": measure.saved_bytes,
        "seconds_per_step": step,
        "estimated_seconds": plan.steps * step + rows * step / plan.batch_size / _PASSES,
    }
