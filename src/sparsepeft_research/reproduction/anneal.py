"""Training all parents before few are kept."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsepeft.inspection.collect import find_memories


class AnnealTopK(TrainerCallback):
    """Lets K fall from P to the config's ``top_k``, in equal steps over the first half of the training.

    A parent that never comes among the first few gets no gradient and stays where it was drawn; with K = P at first all
    of them find their place. It depends on the step alone, so an interrupted training goes on as it would have.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the K of every memory of the model in ``kwargs``."""
        model = kwargs["model"]
        least = model.peft_config[model.active_adapter].top_k
        for found in find_memories(model):
            most = len(found.memory.parent_keys)
            fallen = int(2 * state.global_step / state.max_steps * (most - least + 1))
            found.memory.top_k = max(least, most - fallen)
