"""How fast tasks answer, side by side in one engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from sparsepeft.inference import MultiTaskEngine

BATCH = 64


class Repeats(NamedTuple):
    """How often something is timed: at least and at most so many times, and no longer than so many seconds between."""

    least: int
    most: int
    seconds: float


ONE_TEXT = Repeats(least=5, most=50, seconds=10)
A_BATCH = Repeats(least=3, most=15, seconds=15)


class Speed(NamedTuple):
    """How fast a task answers: milliseconds for one text by itself, texts per second of a batch."""

    latency_ms: float
    texts_per_second: float


def measure_speed(engine: MultiTaskEngine, tasks: Sequence[str], texts: Sequence[tuple[str, ...]]) -> dict[str, Speed]:
    """Time some tasks of an engine on the same texts: the one of median length, and up to 64 of all lengths.

    The tasks answer in turn, and what is given are medians, so that whatever else the machine does meets all of them.

    Args:
        engine: with the tasks.
        tasks: their names.
        texts: one text or two for each input, as the tasks take.
    """
    by_length = sorted(texts, key=lambda one: sum(map(len, one)))
    places = np.linspace(0, len(by_length) - 1, min(BATCH, len(by_length))).astype(int)
    batch, one = [by_length[place] for place in places], [by_length[len(by_length) // 2]]
    of_one, of_batch = (
        _medians({task: partial(engine.logits, task, given) for task in tasks}, repeats)
        for given, repeats in ((one, ONE_TEXT), (batch, A_BATCH))
    )
    return {task: Speed(1000 * of_one[task], len(batch) / of_batch[task]) for task in tasks}


def _medians(calls: Mapping[str, Callable[[], object]], repeats: Repeats) -> dict[str, float]:
    """Median seconds of each call. They take turns, beginning with another one each time; a first round is left out."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    start = time.perf_counter()
    for number in range(repeats.most):
        if number >= repeats.least and time.perf_counter() - start > repeats.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
