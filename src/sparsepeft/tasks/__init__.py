"""Data for training protocols: GLUE, BBC News, local files and a built-in sample."""

from sparsepeft.tasks.early import check_task
from sparsepeft.tasks.errors import TaskError
from sparsepeft.tasks.loading import load_task
from sparsepeft.tasks.registry import task_names, task_spec
from sparsepeft.tasks.spec import TaskData, TaskSpec
from sparsepeft.tasks.splits import few_shot, split_train, subsample

__all__ = [
    "TaskData",
    "TaskError",
    "TaskSpec",
    "check_task",
    "few_shot",
    "load_task",
    "split_train",
    "subsample",
    "task_names",
    "task_spec",
]
