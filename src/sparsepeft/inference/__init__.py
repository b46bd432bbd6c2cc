"""One backbone, many tasks: batches in which every row uses its own task's adapter."""

from sparsepeft.inference.engine import MultiTaskEngine
from sparsepeft.inference.predictions import Prediction
from sparsepeft.inference.task import TaskInfo

__all__ = ["MultiTaskEngine", "Prediction", "TaskInfo"]
