"""Data for training protocols: GLUE, BBC News, GoEmotions, local files and a built-in sample."""

from sparsepeft.errors import TaskError
from sparsepeft.tasks.loading import check_task, load_task
from sparsepeft.tasks.local import FileOptions
from sparsepeft.tasks.spec import TaskData, TaskSpec, task_names, task_spec
from sparsepeft.tasks.splits import few_shot, split_train, subsample

__all__ = [
    "FileOptions",
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
