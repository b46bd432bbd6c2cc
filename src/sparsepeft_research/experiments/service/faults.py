"""What can go wrong between a service and its callers, each beside the answer that the documentation promises."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from sparsepeft_research.experiments.service.clients import Load, Request, ask, in_turn, session
from sparsepeft_research.experiments.service.process import HOST, Server, service
from sparsepeft_research.experiments.service.tasks import expected_scores, is_close, save_tasks, texts

TOKEN, ADMIN = "t" * 32, "a" * 32
BODY_LIMIT, CLIENTS, NUM_TEXTS, MANY = 2_000_000, 8, 64, 10_000
SWAPPED, VARIANTS, WATCHED = "swapped", ("task0", "task1"), "task2"
_WEIGHTS = "adapter_model.safetensors"
_HEAD = (
    f"POST /tasks/task0 HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
)
_SLOW = {
    "silent": b"",
    "half a head": f"{_HEAD}X-".encode(),
    "half a body": f'{_HEAD}Content-Length: 1000\r\n\r\n{{"inputs": '.encode(),
}
_SLOW_CALLERS, _GONE_CALLERS = 200, 100


@dataclass
class _Served:
    """A service and what its tasks should answer."""

    server: Server
    root: Path
    inputs: list[str]
    expected: dict[str, list[dict[str, float]]]

    def requests(self, names: list[str]) -> Iterator[Request]:
        """For these tasks in turn, for ever."""
        for number in itertools.count():
            yield f"/tasks/{names[number % len(names)]}", {"inputs": self.inputs[number % len(self.inputs)]}

    def is_right(self, request: Request, answer: Any, among: tuple[str, ...] = ()) -> bool:
        """Whether an answer is the task's, or of one ``among`` which it may be."""
        names, place = among or (request[0].rpartition("/")[2],), self.inputs.index(request[1]["inputs"])
        given = {one["label"]: one["score"] for one in answer[0]}
        return any(is_close(given, self.expected[name][place]) for name in names)

    async def ask(self, count: int) -> Load:
        """A number of requests for all tasks, by a few callers."""
        requests = itertools.islice(self.requests(list(self.expected)), count)
        return await in_turn(self.server.address, requests, clients=CLIENTS, check=self.is_right, token=TOKEN)


def measure(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results; each of the results says whether it is what it should be."""
    root = work / "tasks"
    root.mkdir()
    tasks = save_tasks(options.model, root, options.num_tasks, options.seed)
    inputs = texts(options.data_dir)[:NUM_TEXTS]
    expected = expected_scores(options.model, tasks, inputs)
    for name, token in (("token", TOKEN), ("admin", ADMIN)):
        (work / name).write_text(token)
    more = ("--tasks-dir", root, "--token-file", work / "token", "--admin-token-file", work / "admin")
    results: dict[str, Any] = {}
    with service(options.model, {}, work / "log", *more, "--payload-limit", BODY_LIMIT) as server:
        served = _Served(server, root, inputs, expected)
        steps: dict[str, Callable[[_Served], Coroutine[Any, Any, dict[str, Any]]]] = {
            "swaps": partial(_swaps, count=options.swaps),
            "wrong requests": _wrong_requests,
            "many texts": _many_texts,
            "slow callers": _slow_callers,
            "callers who leave": _callers_who_leave,
            "broken files": _broken_files,
        }
        for name, step in steps.items():
            results[name] = asyncio.run(step(served))
            print(f"{name}: {results[name]['as_promised']}", flush=True)
        statuses = _logged(server)
        results["all requests"] = {"as_promised": not any(status >= 500 for status in statuses), "statuses": statuses}
    left = {name: folder for name, folder in tasks.items() if name != WATCHED}
    with service(options.model, left, work / "log of a stop") as server:
        served = _Served(server, root, inputs, {name: expected[name] for name in left})
        results["SIGTERM"] = asyncio.run(_stop(served))
    settings = {
        "texts": f"SST-2, validation, {NUM_TEXTS}",
        "swaps": options.swaps,
        "clients": CLIENTS,
    }
    return settings, results


async def _swaps(served: _Served, count: int) -> dict[str, Any]:
    """A task exchanged for another while callers ask it and others; after each, one asks what must be the new one."""
    others, swaps, after, over = list(served.expected)[2:], Counter[int](), Load(), asyncio.Event()

    def check(request: Request, answer: Any) -> bool:
        return served.is_right(request, answer, VARIANTS if request[0].endswith(SWAPPED) else ())

    async with session(served.server.address, ADMIN) as admin:

        async def exchange(variant: str) -> None:
            async with admin.put(f"/v1/tasks/{SWAPPED}", json={"folder": variant}) as answer:
                await answer.read()
                swaps[answer.status] += 1

        await exchange(VARIANTS[0])
        requests = served.requests([SWAPPED, *others])
        asking = asyncio.ensure_future(
            in_turn(served.server.address, requests, clients=CLIENTS, until=over, check=check, token=TOKEN)
        )
        for number in range(1, count + 1):
            variant = VARIANTS[number % 2]
            await exchange(variant)
            is_new = partial(served.is_right, among=(variant,))
            await ask(admin, next(served.requests([SWAPPED])), after, is_new)
        over.set()
        load = await asking
    right = swaps == {201: 1, 200: count} and load.statuses.keys() | after.statuses.keys() == {200}
    return {
        "as_promised": right and not load.wrong and not after.wrong,
        "swaps": {str(status): number for status, number in swaps.items()},
        "load": load.to_dict(),
        "right_after_a_swap": {"asked": after.statuses[200], "wrong": after.wrong},
    }


async def _wrong_requests(served: _Served) -> dict[str, Any]:
    token, admin = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"Bearer {ADMIN}"}
    text, path = {"inputs": "a text"}, "/tasks/task0/predict"
    cases: dict[str, tuple[int, str, str, dict[str, str], Any]] = {
        "no token": (401, "POST", path, {}, text),
        "wrong token": (401, "POST", path, {"Authorization": f"Bearer {TOKEN[:-1]}x"}, text),
        "another scheme": (401, "POST", path, {"Authorization": f"Basic {TOKEN}"}, text),
        "a caller's token for a change": (401, "DELETE", "/v1/tasks/task0", token, None),
        "a folder outside": (404, "PUT", "/v1/tasks/new", admin, {"folder": "../token"}),
        "unknown task": (404, "POST", "/tasks/none/predict", token, text),
        "wrong method": (405, "GET", path, token, None),
        "empty list": (400, "POST", path, token, {"inputs": []}),
        "three texts": (422, "POST", path, token, {"inputs": ["a", "b", "c"]}),
        "a number": (422, "POST", path, token, {"inputs": 7}),
        "no inputs": (422, "POST", path, token, {}),
        "a list": (422, "POST", path, token, [1, 2]),
        "unknown direction": (422, "POST", path, token, text | {"truncation_direction": "Up"}),
        "too long": (422, "POST", path, token, {"inputs": "word " * 2000}),
        "no JSON": (400, "POST", path, token, b'{"inputs": '),
        "no UTF-8": (400, "POST", path, token, b'{"inputs": "\xff\xfe"}'),
        "oversize": (413, "POST", path, token, {"inputs": "a" * (BODY_LIMIT + 1)}),
        "too many texts": (422, "POST", path, token, {"inputs": [["a"]] * MANY}),
        "no ids": (422, "POST", "/classify", token, {"model": "task0", "input": [10**9]}),
    }
    found, problems = {}, []
    async with session(served.server.address) as asker:
        for name, (status, method, where, headers, body) in cases.items():
            raw = isinstance(body, bytes)
            given: dict[str, Any] = {"data": body} if raw else {"json": body} if body is not None else {}
            if raw:
                headers = headers | {"Content-Type": "application/json"}
            async with asker.request(method, where, headers=headers, **given) as answer:
                content = await answer.json()
            found[name] = {"expected": status, "status": answer.status}
            if answer.status != status or "error" not in content:
                problems.append(name)
    return {"as_promised": not problems, "not_as_promised": problems, "cases": found}


async def _many_texts(served: _Served) -> dict[str, Any]:
    """Ten thousand texts in a call are refused as a batch, and answered as a stream, beside one who asks for one."""
    many = [served.inputs[i % len(served.inputs)] for i in range(MANY)]
    body = {"inputs": many, "tasks": ["task0"], "stream": True}
    wrong, lines, over = 0, 0, asyncio.Event()
    async with session(served.server.address, TOKEN) as asker:
        async with asker.post("/v1/predict_all", json=body | {"stream": False}) as refused:
            await refused.read()
        beside = asyncio.ensure_future(
            in_turn(
                served.server.address,
                served.requests(["task3"]),
                clients=1,
                until=over,
                check=served.is_right,
                token=TOKEN,
            )
        )
        began = time.perf_counter()
        async with asker.post("/v1/predict_all", json=body) as answer:
            async for line in answer.content:
                scores = served.expected["task0"][lines % len(served.inputs)]
                wrong += not is_close(json.loads(line)["task0"]["scores"], scores)
                lines += 1
        seconds = time.perf_counter() - began
        over.set()
        load = await beside
    return {
        "as_promised": refused.status == 422 and lines == MANY and not wrong and load.statuses.keys() == {200},
        "as_a_batch": refused.status,
        "as_a_stream": {"lines": lines, "wrong": wrong, "seconds": round(seconds, 1)},
        "beside": load.to_dict(),
    }


async def _slow_callers(served: _Served) -> dict[str, Any]:
    """Connections that say nothing, half a head, or half a body; others are answered meanwhile."""

    async def slow(sent: bytes) -> tuple[int, float]:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(HOST, served.server.port)
        writer.write(sent)
        received = await asyncio.wait_for(reader.read(), 90)
        writer.close()
        return int(received.split()[1]) if received else 0, time.perf_counter() - began

    connections = {
        name: [asyncio.ensure_future(slow(sent)) for _ in range(_SLOW_CALLERS)] for name, sent in _SLOW.items()
    }
    await asyncio.sleep(1)
    load = await served.ask(200)
    results: dict[str, Any] = {}
    for name, each in connections.items():
        ends = await asyncio.gather(*each)
        results[name] = {
            "statuses": {str(status): count for status, count in Counter(status for status, _ in ends).items()},
            "closed_after_s": round(max(seconds for _, seconds in ends), 1),
        }
    all_given_up = all(result["statuses"].keys() == {"408"} for result in results.values())
    return {
        "as_promised": all_given_up and load.statuses == {200: 200} and not load.wrong,
        "connections": results,
        "beside": load.to_dict(),
    }


async def _callers_who_leave(served: _Served) -> dict[str, Any]:
    """Callers who ask for much and leave: what they asked is not computed, and others are answered."""
    body = json.dumps({"inputs": [[text] for text in served.inputs]}).encode()
    head = f"POST /tasks/task0/predict HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def leave() -> None:
        _, writer = await asyncio.open_connection(HOST, served.server.port)
        writer.write(request)
        await writer.drain()
        writer.transport.abort()

    await asyncio.gather(*(leave() for _ in range(_GONE_CALLERS)))
    load = await served.ask(100)
    async with session(served.server.address, TOKEN) as asker, asker.get("/metrics") as answer:
        waiting = next(line for line in (await answer.text()).splitlines() if line.startswith("te_queue_size "))
    return {
        "as_promised": load.statuses == {200: 100} and not load.wrong and float(waiting.split()[1]) == 0,
        "texts_left_behind": _GONE_CALLERS * len(served.inputs),
        "logged_as_left": _logged(served.server)[499],
        "beside": load.to_dict(),
    }


async def _broken_files(served: _Served) -> dict[str, Any]:
    """A watched task's file replaced by garbage: the former version answers until a good one comes."""
    file = served.root / WATCHED / _WEIGHTS
    good, other = file.read_bytes(), (served.root / "task3" / _WEIGHTS).read_bytes()
    request = next(served.requests([WATCHED]))
    found: dict[str, dict[str, Any]] = {}
    async with session(served.server.address, TOKEN) as asker:

        async def replace(content: bytes, words: str) -> bool:
            before = sum(words in line for line in served.server.log_lines)
            file.with_suffix(".new").write_bytes(content)
            file.with_suffix(".new").replace(file)
            for _ in range(100):
                await asyncio.sleep(0.1)
                if sum(words in line for line in served.server.log_lines) > before:
                    return True
            return False

        async def answers_as(name: str) -> bool:
            load = Load()
            await ask(asker, request, load, partial(served.is_right, among=(name,)))
            return load.statuses == {200: 1} and not load.wrong

        for name, content in {
            "garbage": b"\x00garbage" * 99,
            "truncated": good[: len(good) // 2],
            "empty": b"",
        }.items():
            told = await replace(content, f"task {WATCHED}: left as it was")
            found[name] = {"told": told, "former_answers": await answers_as(WATCHED)}
        found["another task's"] = {
            "told": await replace(other, f"task {WATCHED}: replaced"),
            "new_answers": await answers_as("task3"),
        }
        shutil.rmtree(file.parent)
        gone = await _until(partial(_status, asker, request), 404)
        found["removed"] = {"status": 404 if gone else 200}
    right = all(all(value is True for value in one.values()) for name, one in found.items() if name != "removed")
    return {"as_promised": right and gone, "files": found}


async def _status(asker: aiohttp.ClientSession, request: Request) -> int:
    async with asker.post(request[0], json=request[1]) as answer:
        return answer.status


async def _until(look: Callable[[], Coroutine[Any, Any, int]], status: int) -> bool:
    for _ in range(100):
        if await look() == status:
            return True
        await asyncio.sleep(0.1)
    return False


async def _stop(served: _Served) -> dict[str, Any]:
    """SIGTERM while many ask: what was taken is answered, as the log and the callers agree."""
    requests = served.requests(list(served.expected))
    asking = asyncio.ensure_future(
        in_turn(served.server.address, requests, clients=4 * CLIENTS, seconds=8, check=served.is_right)
    )
    batch = {"inputs": [[text] for text in served.inputs] * 8}
    long = Load()
    async with session(served.server.address) as asker:
        await asyncio.sleep(3)
        batches = [asyncio.ensure_future(ask(asker, ("/tasks/task0/predict", batch), long)) for _ in range(2)]
        await asyncio.sleep(0.3)
        began = time.perf_counter()
        served.server.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(served.server.process.wait)
        seconds = time.perf_counter() - began
        await asyncio.gather(*batches)
        load = await asking
    logged, answered = _logged(served.server), load.statuses[200] + long.statuses[200]
    return {
        "as_promised": logged == {200: answered} and long.statuses == {200: 2} and not load.wrong,
        "taken": sum(logged.values()),
        "answered": answered,
        "not_taken": load.statuses[0],
        "stopped_after_s": round(seconds, 2),
        "code": code,
        "load": load.to_dict(),
    }


def _logged(server: Server) -> Counter[int]:
    """The requests of a service's log, by status."""
    return Counter(request["status"] for request in server.requests)
