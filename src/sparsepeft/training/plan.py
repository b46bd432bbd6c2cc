"""What a run is about to do, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.lm_config import LanguageModelConfig


@dataclass(frozen=True)
class RunPlan:
    """What is known when the first step begins.

    Attributes:
        task, method: of the run.
        model: the backbone's name.
        device: where it is trained, as PyTorch names it.
        precision: of the computation.
        sizes: rows, or blocks of text, by part; the first part is trained on.
        steps: of the whole run.
        steps_done: by the checkpoint that the run goes on from; 0 for a new one.
        epochs: passes over the training part.
        batch_size: examples of a step.
        notes: on the data.
        folder: of the output.
    """

    task: str
    method: str
    model: str
    device: str
    precision: str
    sizes: Mapping[str, int]
    steps: int
    steps_done: int
    epochs: float
    batch_size: int
    notes: tuple[str, ...]
    folder: Path


class Announcer(TrainerCallback):
    """Tells what a run is about to do when it begins.

    Args:
        announce: is told.
        config: of the run.
        model: the backbone's name.
        sizes, notes: as in the plan.
    """

    def __init__(
        self,
        announce: Callable[[RunPlan], None],
        config: RunConfig | LanguageModelConfig,
        *,
        model: str,
        sizes: Mapping[str, int],
        notes: tuple[str, ...],
    ) -> None:
        self._announce, self._config = announce, config
        self._model, self._sizes, self._notes = model, sizes, notes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        plan = RunPlan(
            task=self._config.task,
            method=self._config.method,
            model=self._model,
            device=str(args.device),
            precision=self._config.precision,
            sizes=self._sizes,
            steps=state.max_steps,
            steps_done=state.global_step,
            epochs=state.max_steps / -(-next(iter(self._sizes.values())) // batch_size),
            batch_size=batch_size,
            notes=self._notes,
            folder=Path(self._config.output_dir),
        )
        self._announce(plan)
