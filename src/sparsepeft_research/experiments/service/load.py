"""Twice what the service can answer: what comes back, how late, and how much memory that takes."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

from sparsepeft_research.experiments.service.clients import Load, Request, at_rate, in_turn, session
from sparsepeft_research.experiments.service.process import CLIENT_CORE, SERVER_CORE, Server, as_client, service
from sparsepeft_research.experiments.service.tasks import save_tasks, texts

CLIENTS, FACTOR, CAPACITY_S, QUEUE = 32, 2.0, 15.0, 256
_EVERY_S = 1.0


def measure(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results."""
    tasks = save_tasks(options.model, work, options.num_tasks, options.seed)
    as_client()
    with service(options.model, tasks, work / "log", "--queue-size", QUEUE, core=SERVER_CORE) as server:
        results = asyncio.run(_measure(server, list(tasks), texts(options.data_dir), options.seconds))
    settings = {
        "texts": "SST-2, validation",
        "queue_size": QUEUE,
        "factor": FACTOR,
        "capacity_clients": CLIENTS,
        "cores": {"server": SERVER_CORE, "clients": CLIENT_CORE},
    }
    return settings, results


async def _measure(server: Server, names: list[str], inputs: list[str], seconds: float) -> dict[str, Any]:
    requests: itertools.cycle[Request] = itertools.cycle(
        [(f"/tasks/{names[i % len(names)]}", {"inputs": text}) for i, text in enumerate(inputs)]
    )
    await in_turn(server.address, requests, clients=CLIENTS, seconds=CAPACITY_S / 3)
    capacity = await in_turn(server.address, requests, clients=CLIENTS, seconds=CAPACITY_S)
    watched = asyncio.ensure_future(_watch(server))
    overload = await at_rate(server.address, requests, rate=FACTOR * capacity.rate, seconds=seconds)
    watched.cancel()
    memory, health = await watched
    after = await in_turn(server.address, requests, clients=CLIENTS, seconds=CAPACITY_S)
    early = memory[min(len(memory) - 1, 10)]
    return {
        "capacity": capacity.to_dict(),
        "overload": overload.to_dict(),
        "health": health.to_dict(),
        "after": after.to_dict(),
        "memory_mib": {
            "after_10_s": round(early, 1),
            "at_the_end": round(memory[-1], 1),
            "most": round(max(memory), 1),
            "each_30_s": [round(value, 1) for value in memory[:: int(30 / _EVERY_S)]],
        },
    }


async def _watch(server: Server) -> tuple[list[float], Load]:
    """The server's memory, and how fast it says that it is well, each second until cancelled."""
    memory, health = [], Load()
    began = time.perf_counter()
    async with session(server.address) as asker:
        try:
            while True:
                memory.append(server.memory_mib)
                start = time.perf_counter()
                async with asker.get("/health") as answer:
                    await answer.read()
                health.statuses[answer.status] += 1
                health.seconds.append(time.perf_counter() - start)
                await asyncio.sleep(_EVERY_S)
        except asyncio.CancelledError:
            health.duration = time.perf_counter() - began
    return memory, health
