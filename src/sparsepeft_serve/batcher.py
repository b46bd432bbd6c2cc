"""Requests of many callers, answered together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from sparsepeft.errors import UserError
from sparsepeft.inference import MultiTaskEngine, Prediction
from sparsepeft.inference.answering import grouped
from sparsepeft.inference.entities import EntityOptions
from sparsepeft_serve.errors import ServiceError, overloaded
from sparsepeft_serve.metrics import Metrics

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_CHARACTERS = 4  # of a token, about
_LONGEST = 512  # tokens, about


class Options(NamedTuple):
    """How the inputs of a request are to be answered.

    Attributes:
        truncation: cut those that are too long.
        side: where, ``"left"`` or ``"right"``; None is where the tokenizer does.
        num_tasks: that answer each input, which then comes without a task; 0: each comes with its own.
        tasks: which these are; None: all that take as many texts as an input has.
        entities: how tokens that are labelled are put together.
    """

    truncation: bool = True
    side: Any = None
    num_tasks: int = 0
    tasks: tuple[str, ...] | None = None
    entities: EntityOptions = EntityOptions()


class _Job:
    """A request: its inputs, of which some are answered."""

    def __init__(self, inputs: Sequence[Any], options: Options) -> None:
        self.inputs, self.options = inputs, options
        self.answers: list[Any] = [None] * len(inputs)
        self.num_taken = self.num_answered = 0
        self.since = time.perf_counter()
        self.done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    @property
    def weight(self) -> int:
        """Passes that an input takes, about."""
        return max(1, self.options.num_tasks)

    @property
    def num_waiting(self) -> int:
        if self.done.done():  # the caller has left, or another of its batches failed
            return 0
        return (len(self.inputs) - self.num_taken) * self.weight

    def take(self) -> tuple[int, int]:
        """The place of the next input, and about how many tokens it has."""
        place, self.num_taken = self.num_taken, self.num_taken + 1
        return place, _num_tokens(self.inputs[place]) * self.weight

    def put(self, place: int, answer: Any) -> None:
        self.answers[place], self.num_answered = answer, self.num_answered + 1
        if self.num_answered == len(self.inputs) and not self.done.done():
            self.done.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        self.num_taken = len(self.inputs)
        if not self.done.done():
            self.done.set_exception(error)


class Batcher:
    """Gathers what callers ask, and has an engine answer it batch by batch, in a thread of its own.

    While a batch is computed, the next one gathers. Each takes from all requests in turn, so that a long one does not
    keep short ones waiting.

    Args:
        engine: that answers.
        longest_wait_ms: how long an input waits for others while nothing is computed, where callers come together.
        queue_size: inputs that may wait.
        metrics: that are told.
    """

    def __init__(self, engine: MultiTaskEngine, *, longest_wait_ms: float, queue_size: int, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._longest_wait_s, self._queue_size = longest_wait_ms / 1000, queue_size
        self._jobs: deque[_Job] = deque()
        self._num_calls = 0
        self._num_together = 0  # requests in the batch before
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._worker: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def num_waiting(self) -> int:
        """Inputs that no batch has yet, those for several tasks counted for each, and calls between batches."""
        return self._num_calls + sum(job.num_waiting for job in self._jobs)

    @property
    def is_working(self) -> bool:
        """Whether requests are answered."""
        return self._worker is not None and not self._worker.done() and not self._is_closing

    def check_working(self) -> None:
        """Refuse where requests are not answered.

        Raises:
            ServiceError: they are not, yet or any more.
        """
        if not self.is_working:
            raise ServiceError("The service is not ready, or stopping; ask again later.", "Unhealthy")

    def start(self) -> None:
        """Begin to answer, in the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Answer what waits, and stop."""
        self._is_closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def answer(self, requests: Sequence[tuple[str, Any]], options: Options) -> list[Prediction]:
        """Answer (task, input) each.

        Raises:
            ServiceError: too many inputs wait, or the engine failed.
        """
        answers: list[Prediction] = await self._submit(requests, options)
        return answers

    async def answer_all(self, inputs: Sequence[Any], options: Options) -> list[dict[str, Prediction]]:
        """Answer several tasks for each input, as ``options`` say.

        Raises:
            ServiceError: too many inputs wait, or the engine failed.
        """
        answers: list[dict[str, Prediction]] = await self._submit(inputs, options)
        return answers

    async def between_batches(self, call: Callable[[], Result]) -> Result:
        """What ``call`` returns, made in the engine's thread; it waits as a text does.

        Raises:
            ServiceError: too much waits, or nothing is answered any more.
        """
        self.check_working()
        if (waiting := self.num_waiting) >= self._queue_size:
            raise overloaded(waiting)
        self._num_calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._num_calls -= 1

    async def _submit(self, inputs: Sequence[Any], options: Options) -> list[Any]:
        self.check_working()
        if not inputs:
            return []
        job = _Job(inputs, options)
        # A request that alone is larger than the queue would never fit: it is taken where nothing waits.
        if (waiting := self.num_waiting) and waiting + job.num_waiting > self._queue_size:
            raise overloaded(waiting)
        self._jobs.append(job)
        self._arrived.set()
        return await job.done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._jobs:
                if self._is_closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            await self._wait_for_more()
            batch = self._take()
            if not batch:  # their callers have left
                continue
            self._num_together = len({id(job) for job, _ in batch})
            began = time.perf_counter()
            for job, place in batch:
                if place == 0:
                    self._metrics.queued(began - job.since)
            try:
                answers = await loop.run_in_executor(self._thread, self._compute, batch)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # such as a panic in a tokenizer; the next batch may be answered
                logger.exception("A batch of %d inputs failed.", len(batch))
                for job, _ in batch:
                    job.fail(ServiceError(f"The model failed ({type(error).__name__}); ask again later.", "Backend"))
                continue
            self._metrics.computed(len(batch), time.perf_counter() - began)
            for (job, place), answer in zip(batch, answers, strict=True):
                if isinstance(answer, ServiceError):
                    job.fail(answer)
                else:
                    job.put(place, answer)

    async def _wait_for_more(self) -> None:
        """Give others until the first input has waited long enough, unless a batch is full already.

        One caller who asks again and again waits for nobody: the batch before was theirs alone.
        """
        while self._jobs and not self._is_closing and max(self._num_together, len(self._jobs)) > 1:
            left = self._jobs[0].since + self._longest_wait_s - time.perf_counter()
            if left <= 0 or self._num_tokens() >= self._engine.token_budget:
                return
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _num_tokens(self) -> int:
        total = 0
        for job in self._jobs:
            for place in range(job.num_taken, len(job.inputs)):
                total += _num_tokens(job.inputs[place]) * job.weight
                if total >= self._engine.token_budget:
                    return total
        return total

    def _take(self) -> list[tuple[_Job, int]]:
        """A batch's worth of inputs, from all requests in turn."""
        batch: list[tuple[_Job, int]] = []
        num_tokens = 0
        while self._jobs and num_tokens < self._engine.token_budget:
            job = self._jobs.popleft()
            if not job.num_waiting:
                continue
            place, tokens = job.take()
            batch.append((job, place))
            num_tokens += tokens
            if job.num_waiting:
                self._jobs.append(job)
        return batch

    def _compute(self, batch: list[tuple[_Job, int]]) -> list[Any]:
        """Answers; a ``ServiceError`` where an input names a task that has gone meanwhile."""
        answers: list[Any] = [None] * len(batch)
        for alike in grouped(enumerate(batch), lambda one: one[1][0].options):
            options = alike[0][1][0].options
            inputs = [job.inputs[place] for _, (job, place) in alike]
            cutting: dict[str, Any] = {"truncation": options.truncation, "truncation_side": options.side}
            if not options.num_tasks:
                results: list[Any] = list(self._engine.predict(inputs, **cutting, **options.entities._asdict()))
            else:
                try:
                    results = list(self._engine.predict_all(inputs, options.tasks, truncation=options.truncation))
                except UserError as error:  # others in the batch have nothing to do with it
                    results = [ServiceError(str(error), status=404)] * len(inputs)
            for (index, _), result in zip(alike, results, strict=True):
                answers[index] = result
        return answers


def _num_tokens(value: Any) -> int:
    """About how many tokens an input has, be it with its task's name or without."""
    if isinstance(value, tuple):
        value = value[1]
    if isinstance(value, str):
        size = len(value) // _CHARACTERS
    elif isinstance(value, dict):
        size = len(value.get("input_ids", ())) or sum(len(str(text)) for text in value.values()) // _CHARACTERS
    else:
        size = sum(len(text) for text in value) // _CHARACTERS if isinstance(value, (list, tuple)) else 0
    return min(2 + size, _LONGEST)
