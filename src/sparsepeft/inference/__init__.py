"""From texts to answers: one backbone and many tasks, or one run; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.inference.engine import MultiTaskEngine
    from sparsepeft.inference.portable import Entity, Prediction
    from sparsepeft.inference.predictor import Predictor
    from sparsepeft.inference.tasks import TaskInfo

__all__ = ["Entity", "MultiTaskEngine", "Prediction", "Predictor", "TaskInfo"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.inference.engine": ("MultiTaskEngine",),
        "sparsepeft.inference.portable": ("Entity", "Prediction"),
        "sparsepeft.inference.predictor": ("Predictor",),
        "sparsepeft.inference.tasks": ("TaskInfo",),
    },
)
