"""One engine behind HTTP: what all shapes of requests have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.inference import MultiTaskEngine, Prediction, TaskInfo
from sparsepeft.inspection import TextReading, read_text
from sparsepeft_serve.batcher import Batcher, Options
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.metrics import Metrics
from sparsepeft_serve.scores import raised
from sparsepeft_serve.settings import ServeSettings
from sparsepeft_serve.tracing import span


class Service:
    """Answers requests of every shape.

    Args:
        engine: with its tasks.
        settings: of the service.
    """

    def __init__(self, engine: MultiTaskEngine, settings: ServeSettings) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        self._changing = asyncio.Lock()  # or two that load a task, or remove it, would both think that they are first
        self.batcher = Batcher(
            engine,
            longest_wait_ms=settings.longest_wait_ms,
            queue_size=settings.queue_size,
            metrics=self.metrics,
        )

    def task(self, name: str | None) -> tuple[str, TaskInfo]:
        """A task's name and description; the default one where no name is given.

        Raises:
            ServiceError: there is none of that name, or no default.
        """
        tasks = self.engine.tasks
        if name is None:
            name = self.settings.default_task if len(tasks) != 1 else next(iter(tasks))
            if name is None and not tasks:
                raise ServiceError("The service has no task yet; load one.", status=404)
            if name is None:
                raise ServiceError(
                    f"The service has several tasks and none is the default; name one of {', '.join(sorted(tasks))}, "
                    "as in /tasks/NAME/predict."
                )
        if name not in tasks:
            raise ServiceError(
                f"The task {name!r:.80} is unknown; there are {', '.join(sorted(tasks)) or 'none'}.", status=404
            )
        return name, tasks[name]

    async def predict(
        self, name: str, inputs: Sequence[Any], options: Options, method: str, *, in_part: bool = False
    ) -> list[Prediction]:
        """Answer a task's inputs.

        Args:
            in_part: an input that cannot be answered has a prediction with an error; else it is raised.

        Raises:
            ServiceError: too many inputs, too many wait, the engine failed, or the task changed meanwhile.
        """
        self._check_size(len(inputs))
        _, info = self.task(name)
        with self._noted(method, task=name, inputs=len(inputs)):
            answers = await self.batcher.answer([(name, value) for value in inputs], options)
            if any(answer.error is not None for answer in answers):
                self.task(name)  # it may have gone
            if not all(_is_of(answer, info) for answer in answers):
                raise ServiceError(
                    f"The task {name!r:.80} was replaced by one with other labels while it was asked; ask again.",
                    "Unhealthy",
                    retry_after=1,
                )
            for answer in answers:
                self.metrics.predicted(name, answer)
            return answers if in_part else [raised(answer) for answer in answers]

    async def predict_all(self, inputs: Sequence[Any], tasks: Sequence[str] | None) -> list[dict[str, Prediction]]:
        """Answer several tasks for each input, in one pass of the layers that they share; None: all that fit.

        Raises:
            ServiceError: an unknown task, too many inputs, too many wait, or the engine failed.
        """
        self._check_size(len(inputs))
        names, count = self.tasks_of(tasks)
        with self._noted("all", tasks=count, inputs=len(inputs)):
            rows = await self.batcher.answer_all(inputs, Options(num_tasks=count, tasks=names))
        for row in rows:
            for name, answer in row.items():
                self.metrics.predicted(name, answer)
        return rows

    def tasks_of(self, names: Sequence[str] | None) -> tuple[tuple[str, ...] | None, int]:
        """The tasks of these names, each once, and how many they are; None: all.

        Raises:
            ServiceError: there are none, or one is unknown.
        """
        chosen = None if names is None else tuple(self.task(name)[0] for name in dict.fromkeys(names))
        count = len(self.engine.tasks if chosen is None else chosen)
        if not count:
            raise ServiceError("The request names no task, or none is loaded; name one, or load one.")
        return chosen, count

    async def read(self, name: str, text: Any) -> TextReading:
        """What the memories of a task read in a text.

        Raises:
            ServiceError: the task has no memory, or the text cannot be answered.
        """
        with self._noted("memories", task=name):
            try:
                return await self.batcher.between_batches(partial(read_text, self.engine, name, text))
            except UserError as error:
                raise ServiceError(str(error)) from error

    async def load(self, name: str, folder: Path) -> bool:
        """Load a task, in place of the one of that name if there is one; returns whether it is new.

        Raises:
            ServiceError: the folder cannot be used; the service is as before.
        """
        async with self._changing:
            is_new = name not in self.engine.tasks
            change = self.engine.add if is_new else self.engine.replace
            try:
                check_weights_format(folder)
                await asyncio.to_thread(change, name, folder)
            except UserError as error:
                raise ServiceError(str(error)) from error
            return is_new

    async def unload(self, name: str) -> None:
        """Forget a task; requests for it that no batch has yet are told that it is unknown.

        Raises:
            ServiceError: there is none.
        """
        async with self._changing:
            self.task(name)
            await asyncio.to_thread(self.engine.remove, name)

    def _check_size(self, count: int) -> None:
        if count == 0:
            raise ServiceError("The request has no input; pass at least one text.", "Empty")
        if count > self.settings.max_client_batch_size:
            raise ServiceError(
                f"The request has {count} inputs; at most {self.settings.max_client_batch_size} are answered at a "
                "time: send them in parts."
            )

    @contextmanager
    def _noted(self, method: str, **about: Any) -> Any:
        began = time.perf_counter()
        self.metrics.asked(method)
        try:
            with span("sparsepeft.predict", **about):
                yield
        except ServiceError as error:
            self.metrics.failed(error.kind)
            raise
        self.metrics.answered(method, time.perf_counter() - began)


def check_weights_format(folder: Path) -> None:
    """Refuse a folder with weights in a format that can run code when it is read.

    Raises:
        UserError: it is one, or has no weights.
    """
    others = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(ending))
    # Others of these names are read where there are none in safetensors.
    read = [name for name in others if (safe := _safe_name(name)) is not None and not (folder / safe).is_file()]
    if not [*folder.glob("*.safetensors")]:
        read = others
    if read:
        raise UserError(f"{folder.name} has its weights in {read[0]}, but only safetensors are read; save it again.")


def _is_of(answer: Prediction, info: TaskInfo) -> bool:
    """Whether an answer is one of a task with this description."""
    if answer.error is not None:
        return True
    return (answer.entities is not None) == info.labels_tokens and (
        info.labels_tokens or tuple(answer.scores) == (info.label_names or ())
    )


def _safe_name(name: str) -> str | None:
    """What weights that can run code are called in safetensors; None where the name is none that is looked for."""
    if name.startswith("pytorch_model-"):  # one of several
        return "model.safetensors.index.json"
    return {"adapter_model.bin": "adapter_model.safetensors", "pytorch_model.bin": "model.safetensors"}.get(name)
