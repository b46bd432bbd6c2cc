"""From texts to answers: one backbone and many tasks, or one run; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.inference.answers import Answer, answer
    from sparsepeft.inference.engine import MultiTaskEngine
    from sparsepeft.inference.evaluation import Evaluation, evaluate
    from sparsepeft.inference.portable import Entity, Prediction
    from sparsepeft.inference.predictor import Predictor
    from sparsepeft.inference.questions import TableOptions, read_lines, read_questions
    from sparsepeft.inference.tasks import TaskInfo

__all__ = [
    "Answer",
    "Entity",
    "Evaluation",
    "MultiTaskEngine",
    "Prediction",
    "Predictor",
    "TableOptions",
    "TaskInfo",
    "answer",
    "evaluate",
    "read_lines",
    "read_questions",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.inference.answers": ("Answer", "answer"),
        "sparsepeft.inference.engine": ("MultiTaskEngine",),
        "sparsepeft.inference.evaluation": ("Evaluation", "evaluate"),
        "sparsepeft.inference.portable": ("Entity", "Prediction"),
        "sparsepeft.inference.predictor": ("Predictor",),
        "sparsepeft.inference.questions": ("TableOptions", "read_lines", "read_questions"),
        "sparsepeft.inference.tasks": ("TaskInfo",),
    },
)
