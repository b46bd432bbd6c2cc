"""The tuner of bottleneck adapters."""

from __future__ import annotations

from sparsepeft.tuners.base import TaskTuner
from sparsepeft.tuners.bottleneck.layer import BottleneckLayer


class BottleneckModel(TaskTuner):
    """Adds bottleneck adapters to a model; made by ``get_peft_model(model, BottleneckConfig(...))``."""

    prefix = "bottleneck_"
    layer_class = BottleneckLayer
