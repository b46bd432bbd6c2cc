"""The service beside the engine alone and a server with a pipeline for each task, each on the same one processor.

They take turns; the callers have another processor. The pipelines' models are whole ones, as full fine-tuning leaves
them; what they answer does not matter here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from sparsepeft.backbones import resolve_model
from sparsepeft.methods.models import load_tokenizer
from sparsepeft_research.benchmarks.workers import Worker
from sparsepeft_research.experiments.service.clients import Load, Request, in_turn
from sparsepeft_research.experiments.service.process import CLIENT_CORE, SERVER_CORE, Server, as_client, service
from sparsepeft_research.experiments.service.tasks import save_tasks, texts

CLIENTS, ROUNDS, NUM_REQUESTS, NUM_TEXTS, NUM_SINGLE = 32, 3, 96, 12, 10
_HERE = "sparsepeft_research.experiments.service"


def measure(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results: each value is a median over rounds, beside all of them."""
    tasks = save_tasks(options.model, work, options.num_tasks, options.seed)
    whole = {name: _save_whole(options.model, work / f"whole-{name}", options.seed) for name in tasks}
    inputs, names = texts(options.data_dir), list(tasks)
    requests = [(names[i % len(names)], inputs[i]) for i in range(NUM_REQUESTS)]
    few = inputs[:NUM_TEXTS]
    about = {
        "model": resolve_model(options.model),
        "tasks": {name: str(folder) for name, folder in tasks.items()},
        "requests": requests,
        "texts": few,
        "together": CLIENTS,
        "core": SERVER_CORE,
        "threads": 1,
    }
    as_client()
    posted: list[Request] = [(f"/tasks/{name}", {"inputs": text}) for name, text in requests]
    every: list[Request] = [("/v1/predict_all", {"inputs": text}) for text in few]
    apart: list[Request] = [(f"/tasks/{name}", {"inputs": text}) for text in few for name in names]
    arguments = [f"{_HERE}.pipeline_server", *(f"{name}={folder}" for name, folder in whole.items())]
    with (
        Worker([sys.executable, "-m", f"{_HERE}.engine_process"], about, work / "engine.json") as engine,
        service(options.model, tasks, work / "log", core=SERVER_CORE) as ours,
        service(options.model, tasks, work / "log of bf16", "--dtype", "bf16", core=SERVER_CORE) as half,
        Server(arguments, work / "pipelines", SERVER_CORE) as pipelines,
    ):

        def alone(name: str) -> float:
            return float(engine.ask(f"pass {name}")["ms"]) / 1e3

        def single(server: Server) -> float:
            return statistics.median(_answered(server, posted[:1] * NUM_SINGLE, 1).seconds)

        turns: dict[str, tuple[int, Callable[[], float]]] = {
            "engine, 32 texts at a time": (NUM_REQUESTS, lambda: alone("together")),
            "engine, all texts at once": (NUM_REQUESTS, lambda: alone("at once")),
            "service, 32 callers": (NUM_REQUESTS, lambda: _seconds(ours, posted, CLIENTS)),
            "service in bfloat16, 32 callers": (NUM_REQUESTS, lambda: _seconds(half, posted, CLIENTS)),
            "pipelines, 32 callers": (NUM_REQUESTS, lambda: _seconds(pipelines, posted, CLIENTS)),
            "engine, every task": (NUM_TEXTS, lambda: alone("every")),
            "service, every task": (NUM_TEXTS, lambda: _seconds(ours, every, CLIENTS)),
            "service in bfloat16, every task": (NUM_TEXTS, lambda: _seconds(half, every, CLIENTS)),
            "pipelines, every task": (NUM_TEXTS, lambda: _seconds(pipelines, apart, CLIENTS)),
            "engine, one text": (1, lambda: statistics.median(alone("one") for _ in range(NUM_SINGLE))),
            "service, one caller": (1, lambda: single(ours)),
            "service in bfloat16, one caller": (1, lambda: single(half)),
            "pipelines, one caller": (1, lambda: single(pipelines)),
        }
        seconds = _in_rounds({name: turn for name, (_, turn) in turns.items()})
        memory = {
            "engine": engine.ask("peak")["peak_bytes"] / 2**20,
            "service": ours.memory_mib,
            "service in bfloat16": half.memory_mib,
            "pipelines": pipelines.memory_mib,
        }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rate = {name: count / medians[name] for name, (count, _) in turns.items()}

    def over(name: str, base: str) -> dict[str, float]:
        """Texts a second over another's, with one task each and for every task."""
        one = "engine, 32 texts at a time" if base == "engine" else f"{base}, 32 callers"
        return {
            "one task": round(rate[f"{name}, 32 callers"] / rate[one], 3),
            "every task": round(rate[f"{name}, every task"] / rate[f"{base}, every task"], 3),
        }

    results = {
        name: {"texts": count, "seconds": round(medians[name], 4), "rounds": seconds[name]}
        for name, (count, _) in turns.items()
    }
    return (
        {
            "callers": CLIENTS,
            "rounds": ROUNDS,
            "cores": {"server": SERVER_CORE, "clients": CLIENT_CORE},
        },
        {
            "times": results,
            "service_over_engine": over("service", "engine"),
            "service_over_pipelines": over("service", "pipelines"),
            "bfloat16_over_pipelines": over("service in bfloat16", "pipelines"),
            "added_latency_ms": round(1e3 * (medians["service, one caller"] - medians["engine, one text"]), 2),
            "memory_mib": {name: round(value, 1) for name, value in memory.items()},
            "pipelines_memory_over": {
                name: round(memory["pipelines"] / memory[name], 2) for name in ("service", "service in bfloat16")
            },
        },
    )


def _save_whole(model: str | None, folder: Path, seed: int) -> Path:
    resolved = resolve_model(model)
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(resolved, num_labels=2).save_pretrained(folder)
    load_tokenizer(resolved).save_pretrained(folder)
    return folder


def _seconds(server: Server, requests: Sequence[Request], clients: int) -> float:
    """Until all are answered."""
    return _answered(server, requests, clients).duration


def _answered(server: Server, requests: Sequence[Request], clients: int) -> Load:
    """What callers saw, of whom each asks again as soon as it is answered.

    Raises:
        RuntimeError: a request was not answered.
    """
    load = asyncio.run(in_turn(server.address, iter(requests), clients=clients))
    if load.statuses != {200: len(requests)}:
        raise RuntimeError(f"{len(requests)} requests were answered by {dict(load.statuses)} ({dict(load.problems)})")
    return load


def _in_rounds(turns: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each in turn, again and again, beginning with another each time; a first round is not counted."""
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS + 1):
        place = number % len(names)
        for name in (*names[place:], *names[:place]):
            value = turns[name]()
            if number:
                seconds[name].append(round(value, 4))
        print(f"round {number} of {ROUNDS}", flush=True)
    return seconds
