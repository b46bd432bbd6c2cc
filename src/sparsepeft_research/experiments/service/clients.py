"""Callers: a number of them that wait for their answers, or as many as come."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Request = tuple[str, Any]  # path and body
Check = Callable[[Request, Any], bool]


@dataclass
class Load:
    """What callers saw.

    Attributes:
        statuses: how often each came; 0 where there was no answer.
        seconds: from each request to its answer with status 200.
        wrong: answers with status 200 that were not what they should be.
        problems: what was said where there was no answer.
        duration: seconds of it all.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    duration: float = 0.0

    @property
    def rate(self) -> float:
        """Answers with status 200 in a second."""
        return self.statuses[200] / self.duration

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "requests": sum(self.statuses.values()),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": self.wrong,
            "problems": dict(self.problems),
            "seconds": round(self.duration, 1),
            "answered_per_second": round(self.rate, 2),
            "latency_ms": percentiles(self.seconds),
        }


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the longest, in milliseconds."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    named = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1e3 * value, 2) for name, value in named.items()}


def session(address: str, token: str | None = None) -> aiohttp.ClientSession:
    """Connections to a server, as many as it takes."""
    return aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=1800),
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
    )


async def ask(asker: aiohttp.ClientSession, request: Request, load: Load, check: Check | None = None) -> None:
    """Post a request and note what came."""
    began = time.perf_counter()
    try:
        async with asker.post(request[0], json=request[1]) as answer:
            content = await answer.json()
            load.statuses[answer.status] += 1
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        load.statuses[0] += 1
        load.problems[type(error).__name__] += 1
        return
    if answer.status == 200:
        load.seconds.append(time.perf_counter() - began)
        load.wrong += check is not None and not check(request, content)


async def in_turn(
    address: str,
    requests: Iterator[Request],
    *,
    clients: int,
    seconds: float | None = None,
    until: asyncio.Event | None = None,
    check: Check | None = None,
    token: str | None = None,
) -> Load:
    """Callers of whom each asks again as soon as it is answered, for a time or until told or there is no request."""
    load, end = Load(), None if seconds is None else time.perf_counter() + seconds

    async def caller(asker: aiohttp.ClientSession) -> None:
        for request in requests:
            await ask(asker, request, load, check)
            if (end is not None and time.perf_counter() >= end) or (until is not None and until.is_set()):
                return

    async with session(address, token) as asker:
        began = time.perf_counter()
        await asyncio.gather(*(caller(asker) for _ in range(clients)))
        load.duration = time.perf_counter() - began
    return load


async def at_rate(address: str, requests: Iterator[Request], *, rate: float, seconds: float) -> Load:
    """Callers who come at even distances, whether those before them are answered or not."""
    load = Load()
    asked: set[asyncio.Future[None]] = set()
    async with session(address) as asker:
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            task = asyncio.ensure_future(ask(asker, next(requests), load))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        load.duration = time.perf_counter() - began
    return load
