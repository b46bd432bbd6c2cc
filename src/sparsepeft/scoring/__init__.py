"""Files that a run answers, and what it scores on them; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.scoring.answers import Answer, answer
    from sparsepeft.scoring.evaluation import Evaluation, evaluate
    from sparsepeft.scoring.questions import TableOptions, read_lines, read_questions

__all__ = ["Answer", "Evaluation", "TableOptions", "answer", "evaluate", "read_lines", "read_questions"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.scoring.answers": ("Answer", "answer"),
        "sparsepeft.scoring.evaluation": ("Evaluation", "evaluate"),
        "sparsepeft.scoring.questions": ("TableOptions", "read_lines", "read_questions"),
    },
)
