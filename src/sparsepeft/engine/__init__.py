"""One backbone, many tasks: batches in which every row uses its own task's adapter."""

from sparsepeft.engine.engine import MultiTaskEngine
from sparsepeft.engine.task import TaskInfo
from sparsepeft.predictions import Prediction

__all__ = ["MultiTaskEngine", "Prediction", "TaskInfo"]
