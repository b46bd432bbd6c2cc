"""From the rows of a chunk to what is written for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparsepeft.bulk.inputs import Chunk, Source
from sparsepeft.bulk.outputs import encode
from sparsepeft.bulk.plan import Plan
from sparsepeft.inference import MultiTaskEngine, Prediction
from sparsepeft.inference.sentences import overlap
from sparsepeft.scoring.questions import Question


@dataclass(frozen=True)
class Scored:
    """A chunk with its answers.

    Attributes:
        file, place, share, is_last, failure: see :class:`~sparsepeft.bulk.inputs.Chunk`.
        content: what is written for it.
        rows: that it has.
        failed: those of them that a task could not answer.
        truncated: those that were longer than a task takes.
    """

    file: int
    place: int
    content: Any = b""
    rows: int = 0
    failed: int = 0
    truncated: int = 0
    share: float = 1.0
    is_last: bool = False
    failure: str | None = None


class Scorer:
    """Answers chunks by one engine, which is loaded for the first of them.

    Args:
        plan: what is asked.
        sources: the files, by their numbers.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source]) -> None:
        self._plan, self._sources = plan, sources

    @cached_property
    def _engine(self) -> MultiTaskEngine:
        plan = self._plan
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        folders = {name: info.folder for name, info in plan.tasks.items()}
        options: dict[str, Any] = {"dtype": plan.dtype, "device": plan.device, "token_budget": plan.token_budget}
        return MultiTaskEngine(plan.model, folders, **options)

    def __call__(self, chunk: Chunk) -> Scored:
        """Answer a chunk.

        Raises:
            UserError: the backbone or a task cannot be loaded.
        """
        if chunk.failure is not None:
            return Scored(chunk.file, chunk.place, is_last=True, failure=chunk.failure)
        answers = self._answers(chunk.questions)
        return Scored(
            chunk.file,
            chunk.place,
            encode(chunk, self._sources[chunk.file], self._plan.tasks, answers),
            rows=len(answers),
            failed=sum(any(one.error is not None for one in row.values()) for row in answers),
            truncated=sum(any(one.truncated for one in row.values()) for row in answers),
            share=chunk.share,
            is_last=chunk.is_last,
        )

    def _answers(self, questions: Sequence[Question]) -> list[dict[str, Prediction]]:
        """For each question the prediction of each task, in the order of the tasks."""
        plan = self._plan
        found: list[dict[str, Prediction]] = [
            {} if one.error is None else dict.fromkeys(plan.tasks, Prediction.failed(one.error)) for one in questions
        ]
        places = [place for place, one in enumerate(questions) if one.error is None]
        for count in (1, 2):
            names = [name for name in plan.tasks if plan.num_texts_of(name) == count]
            if not names:
                continue
            texts = [self._texts(questions[place].texts, count) for place in places]
            for place, row in zip(places, self._engine.predict_all(texts, names), strict=True):
                found[place] |= row
        for name, info in plan.tasks.items():
            if info.labels_tokens:
                self._read_in_parts(name, questions, found)
        return [{name: row[name] for name in plan.tasks} for row in found]

    def _texts(self, texts: Any, count: int) -> Any:
        """Of a row's two texts the first, for a task that reads one."""
        return texts[0] if count < self._plan.num_texts and isinstance(texts, list) and texts else texts

    def _read_in_parts(self, name: str, questions: Sequence[Question], found: list[dict[str, Prediction]]) -> None:
        """Answer once more what was cut, where tokens are labelled: a text may then have any length."""
        cut = [place for place, row in enumerate(found) if row[name].truncated]
        if not cut:
            return
        with self._engine.loaded(name) as task:
            stride = overlap(task.encoder.tokenizer, task.max_length)
        requests = [(name, self._texts(questions[place].texts, 1)) for place in cut]
        for place, answer in zip(cut, self._engine.predict(requests, stride=stride), strict=True):
            found[place][name] = answer
