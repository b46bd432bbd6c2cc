"""Batching across callers, limits, tokens, and tasks that come and go, while the service answers."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.inference.conftest import TASKS, save_task
from tests.inference.serve.conftest import answering

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft_serve import ServeSettings, create_app
from sparsepeft_serve.batcher import Batcher, Options
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.folder import FolderWatch, signatures
from sparsepeft_serve.limits import Limits
from sparsepeft_serve.metrics import Metrics
from sparsepeft_serve.protocol import HeadTimeoutProtocol
from sparsepeft_serve.settings import check_host, read_tokens

TEXT, OTHER = "the striker scored twice", "flour prices kept climbing"
TOKEN, ADMIN = "a" * 32, "b" * 32


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class SlowEngine:
    """Notes what it is asked, and waits until it may answer."""

    token_budget = 40

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.may_answer = threading.Event()

    def predict(self, inputs: list[Any], **options: Any) -> list[Any]:
        self.calls.append(inputs)
        self.may_answer.wait(10)
        if any(text == "bad" for _, text in inputs):
            raise RuntimeError("out of memory")
        return [f"{task}: {text}" for task, text in inputs]


def test_what_waits_is_batched_in_turn_and_bounded() -> None:
    engine = SlowEngine()

    async def ask() -> None:
        batcher = Batcher(engine, longest_wait_ms=0, queue_size=30, metrics=Metrics())  # type: ignore[arg-type]
        with pytest.raises(ServiceError, match="not ready"):
            await batcher.answer([("a", "x")], Options())
        batcher.start()
        first = asyncio.create_task(batcher.answer([("a", "x")], Options()))
        while not engine.calls:  # until it is being computed
            await asyncio.sleep(0.001)
        long = asyncio.create_task(batcher.answer([("a", str(i)) for i in range(25)], Options()))
        short = asyncio.create_task(batcher.answer([("b", "y")], Options()))
        await asyncio.sleep(0.05)
        with pytest.raises(ServiceError, match="26 texts are waiting") as overloaded:
            await batcher.answer([("c", "z")] * 6, Options())
        calls = [asyncio.create_task(batcher.between_batches(lambda: "called")) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="30 texts are waiting"):
            await calls.pop()
        assert (overloaded.value.status, overloaded.value.retry_after) == (429, 1)
        engine.may_answer.set()
        assert await first == ["a: x"]
        assert await asyncio.gather(*calls) == ["called"] * 4
        assert await short == ["b: y"]
        assert not long.done()  # the short one did not wait for all of it
        assert await long == [f"a: {i}" for i in range(25)]
        with pytest.raises(ServiceError, match=r"The model failed \(RuntimeError\)") as failed:
            await batcher.answer([("a", "bad")], Options())
        assert failed.value.status == 424
        assert await batcher.answer([("a", "x")], Options()) == ["a: x"]
        last = asyncio.create_task(batcher.answer([("a", "x")], Options()))
        await asyncio.sleep(0)
        await batcher.close()
        assert await last == ["a: x"]  # taken before the end

    asyncio.run(ask())
    assert engine.calls[1][:3] == [("a", "0"), ("b", "y"), ("a", "1")]


def test_many_callers_get_their_own_answers(engine: MultiTaskEngine) -> None:
    names = [name for name in TASKS if name != "upper"]
    texts = [f"{TEXT} {'again ' * (i % 7)}" for i in range(60)]
    expected = engine.predict([(names[i % len(names)], text) for i, text in enumerate(texts)])
    with TestClient(create_app(engine)) as client, ThreadPoolExecutor(16) as pool:

        def ask(i: int) -> Any:
            body = {"inputs": texts[i], "parameters": {"top_k": 1}}
            return client.post(f"/tasks/{names[i % len(names)]}", json=body).json()[0][0]["score"]

        found = list(pool.map(ask, range(60)))
        metrics = client.get("/metrics").text
    assert found == pytest.approx([one.score for one in expected], abs=1e-5)
    batches = float(metrics.split("te_batch_next_size_count ")[1].split()[0])
    assert batches < 60  # some were answered together


def test_bodies(engine: MultiTaskEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsepeft_serve.requests")
    with TestClient(create_app(engine, ServeSettings(default_task="two", payload_limit=1000))) as client:
        assert client.post("/predict", json={"inputs": "a" * 2000}).status_code == 413
        parts = (b"a" * 300 for _ in range(10))  # no length is announced
        assert client.post("/predict", content=parts).status_code == 413
        as_json = {"Content-Type": "application/json"}
        wrong = client.post("/predict", content=b'{"inputs": ', headers=as_json)
        assert (wrong.status_code, wrong.json()["error_type"]) == (400, "Validation")
        assert "no JSON" in wrong.json()["error"]
        half = client.post("/predict", content=b'{"inputs": "\\ud800"}', headers=as_json)
        assert half.status_code == 422
        assert "surrogate" in half.json()["error"]
        assert client.post("/predict", json={"inputs": TEXT}).status_code == 200
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("requests")]
    assert [line["status"] for line in lines] == [413, 413, 400, 422, 200]
    assert TEXT not in caplog.text


def test_a_body_that_does_not_come() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(5)

    async def send(message: Any) -> None:
        sent.append(message)

    limits = Limits(None, ServeSettings(body_timeout=0.05))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(limits(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"did not arrive within 0.05 seconds" in sent[1]["body"]


def test_tokens(engine: MultiTaskEngine, tmp_path: Path) -> None:
    settings = ServeSettings(default_task="two", tokens=(TOKEN,), admin_tokens=(ADMIN,), tasks_dir=tmp_path)
    with TestClient(create_app(engine, settings)) as client:
        for path in ("/health", "/ping", "/v2/health/live", "/v2/health/ready", "/"):
            assert client.get(path).status_code == 200
        for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {TOKEN}"}, bearer("")):
            answer = client.post("/predict", json={"inputs": TEXT}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == client.get("/v2").status_code == 401
        assert client.post("/", json={"inputs": TEXT}).status_code == 401  # although the page is there
        for token in (TOKEN, ADMIN):
            assert client.post("/predict", json={"inputs": TEXT}, headers=bearer(token)).status_code == 200
        assert client.delete("/v1/tasks/two", headers=bearer(TOKEN)).status_code == 401
        assert client.put("/v1/tasks/no", headers=bearer(ADMIN)).status_code == 404
    with TestClient(create_app(engine)) as client:
        refused = client.delete("/v1/tasks/two")
    assert refused.status_code == 403
    assert "--admin-token-file" in refused.json()["error"]

    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{ADMIN}\n")
    assert read_tokens(file) == (TOKEN, ADMIN)
    for content, words in (("", "is empty"), ("short", "a token of 5 characters")):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            read_tokens(file)
    check_host("127.0.0.1", ())
    check_host("::1", ())
    check_host("0.0.0.0", (TOKEN,))
    with pytest.raises(UserError, match="can be reached from other machines"):
        check_host("0.0.0.0", ())


@pytest.fixture
def root(backbone: Path, tmp_path: Path) -> Path:
    for name in ("two", "five"):
        save_task(backbone, tmp_path / "tasks" / name, TASKS[name])
    save_task(backbone, tmp_path / "outside", TASKS["two"])
    return tmp_path / "tasks"


def test_tasks_come_and_go_over_http(backbone: Path, root: Path) -> None:
    engine = MultiTaskEngine(backbone, {"two": root / "two"})
    settings = ServeSettings(admin_tokens=(ADMIN,), tasks_dir=root)
    with TestClient(create_app(engine, settings), headers=bearer(ADMIN)) as client:
        before = client.post("/tasks/two", json={"inputs": TEXT}).json()
        assert client.put("/v1/tasks/other", json={"folder": "five"}).status_code == 201
        assert client.put("/v1/tasks/two", json={"folder": "five"}).status_code == 200
        after = client.post("/tasks/two", json={"inputs": TEXT}).json()
        assert (len(before[0]), len(after[0])) == (2, 5)
        for folder in ("../outside", str(root.parent / "outside"), ".", "five/../two", "nowhere", "a\0b"):
            assert client.put("/v1/tasks/new", json={"folder": folder}).status_code == 404
        (root / "link").symlink_to(root.parent / "outside")
        assert client.put("/v1/tasks/link").status_code == 404
        (root / "five" / "adapter_model.safetensors").write_bytes(b"garbage")
        assert client.put("/v1/tasks/two", json={"folder": "five"}).status_code == 422
        assert client.post("/tasks/two", json={"inputs": TEXT}).json() == after  # the former version answers
        assert client.delete("/v1/tasks/two").status_code == 204
        assert client.delete("/v1/tasks/two").status_code == 404
        assert client.post("/tasks/two", json={"inputs": TEXT}).status_code == 404
        pickled = root / "pickled"
        shutil.copytree(root / "two", pickled)
        (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
        refused = client.put("/v1/tasks/pickled")
        assert refused.status_code == 422
        assert "only safetensors are read" in refused.json()["error"]


def test_a_watched_folder(backbone: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = MultiTaskEngine(backbone, {"two": root / "two"})
    with TestClient(create_app(engine)) as client:
        service: Any = client.app.state.service  # type: ignore[attr-defined]
        watch = FolderWatch(service, root)
        watch.note_loaded({"two": signatures(root)["two"]})

        def look() -> set[str]:
            client.portal.call(watch.look)  # type: ignore[union-attr]
            return set(engine.tasks)

        assert look() == {"two"}  # the other is seen once
        assert look() == {"two", "five"}
        save_task(backbone, root / "two", TASKS["five"])
        look()
        assert engine.tasks["two"].num_outputs == 2  # it may still be written
        look()
        assert engine.tasks["two"].num_outputs == 5
        (root / "two" / "adapter_model.safetensors").write_bytes(b"garbage")
        for _ in range(4):
            look()
        assert engine.tasks["two"].num_outputs == 5
        assert caplog.text.count("task two: left as it was") == 1
        (root / "five" / "adapter_config.json").unlink()  # as while other files are copied to its place
        look()
        shutil.rmtree(root / "five")
        assert look() == {"two", "five"}  # it may be about to be replaced
        assert look() == {"two"}
        assert client.post("/predict", json={"inputs": TEXT}).status_code == 200


def test_a_watched_folder_leaves_tasks_from_elsewhere_alone(backbone: Path, root: Path) -> None:
    outside = root.parent / "outside"
    engine, before = MultiTaskEngine(backbone, {"two": root / "two", "five": outside}), signatures(root)
    save_task(backbone, root / "two", TASKS["degree"])  # after it was loaded
    settings = ServeSettings(tasks_dir=root)
    with TestClient(create_app(engine, settings, loaded={"two": before["two"]})) as client:
        deadline = time.monotonic() + 60
        while engine.tasks["two"].problem_type != "regression":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        watch = FolderWatch(client.app.state.service, root)  # type: ignore[attr-defined]
        for gone in (False, True):
            if gone:
                shutil.rmtree(root / "five")
            for _ in range(3):
                client.portal.call(watch.look)  # type: ignore[union-attr]
            assert engine.tasks["five"].folder == outside


def test_two_requests_for_the_same_change_do_not_fail_each_other(backbone: Path, root: Path) -> None:
    engine = MultiTaskEngine(backbone, {"two": root / "two"})
    settings = ServeSettings(admin_tokens=(ADMIN,), tasks_dir=root)
    change, is_changing, may_change = engine.remove, threading.Event(), threading.Event()

    def slow(name: str) -> None:
        is_changing.set()
        assert may_change.wait(60)
        change(name)

    engine.remove = slow  # type: ignore[method-assign]
    with TestClient(create_app(engine, settings), headers=bearer(ADMIN)) as client, ThreadPoolExecutor(2) as threads:
        found = [threads.submit(client.delete, "/v1/tasks/two") for _ in range(2)]
        assert is_changing.wait(60)
        time.sleep(0.2)  # in which the second comes
        may_change.set()
        assert sorted(each.result().status_code for each in found) == [204, 404]


def test_a_panic_of_the_engine_ends_no_service(backbone: Path, root: Path) -> None:
    engine = MultiTaskEngine(backbone, {"two": root / "two"})
    predict = engine.predict

    class Panic(BaseException):
        """As Rust's, in tokenizers."""

    def panics(*args: Any, **options: Any) -> Any:
        raise Panic

    with TestClient(create_app(engine)) as client:
        engine.predict = panics  # type: ignore[method-assign]
        assert client.post("/predict", json={"inputs": TEXT}).status_code == 424
        engine.predict = predict  # type: ignore[method-assign]
        assert client.post("/predict", json={"inputs": TEXT}).status_code == 200


def test_memories(engine: MultiTaskEngine) -> None:
    with TestClient(create_app(engine)) as client:
        found = client.post("/v1/memories", json={"task": "five", "inputs": TEXT}).json()
        assert len(found["tokens"]) == 2 + len(TEXT.split())
        assert [layer["layer"] for layer in found["layers"]] == [0, 1]
        for layer in found["layers"]:
            assert layer["num_parents"] == 9
            assert len(layer["parents"]) == len(found["tokens"])
            assert all(len(set(parents)) == 4 for parents in layer["parents"])
            assert all(sum(gates) == pytest.approx(1, abs=1e-5) for gates in layer["gates"])
        refused = client.post("/v1/memories", json={"task": "pfeiffer", "inputs": TEXT})
        assert refused.status_code == 422
        assert "has no SPARTAN memory" in refused.json()["error"]


def test_the_page(engine: MultiTaskEngine) -> None:
    with TestClient(create_app(engine)) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "<title>sparsepeft</title>" in page.text
        for name in ("style.css", "page.js"):
            text = client.get(f"/page/{name}").text
            assert "http://" not in text
            assert "https://" not in text  # nothing from elsewhere


def test_a_stop_answers_what_was_taken(engine: MultiTaskEngine) -> None:
    app = create_app(engine, ServeSettings(default_task="two"))
    with TestClient(app) as client, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.post, "/predict", json={"inputs": [[TEXT]] * 50}) for _ in range(4)]
        while not app.state.service.batcher.num_waiting and not all(one.done() for one in asked):
            time.sleep(0.001)
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert not app.state.service.batcher.is_working


def test_nothing_is_computed_for_callers_who_have_left() -> None:
    engine = SlowEngine()

    async def ask() -> None:
        batcher = Batcher(engine, longest_wait_ms=0, queue_size=30, metrics=Metrics())  # type: ignore[arg-type]
        batcher.start()
        first = asyncio.create_task(batcher.answer([("a", "x")], Options()))
        while not engine.calls:
            await asyncio.sleep(0.001)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await batcher.answer([("a", "left")] * 20, Options())

        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b""})
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        request = asyncio.create_task(Limits(app, ServeSettings())(scope, messages.get, messages.put))
        while batcher.num_waiting != 20:
            await asyncio.sleep(0.001)
        messages.put_nowait({"type": "http.disconnect"})
        await request
        assert batcher.num_waiting == 0
        engine.may_answer.set()
        assert await first == ["a: x"]
        await batcher.close()

    asyncio.run(ask())
    assert engine.calls == [[("a", "x")]]


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: here\r\nX-"])
def test_a_head_that_does_not_come(engine: MultiTaskEngine, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadTimeoutProtocol, "head_seconds", 0.3)
    with answering(engine) as address, socket.create_connection(address.removeprefix("http://").split(":")) as slow:
        slow.settimeout(30)
        slow.sendall(sent)
        received = b"".join(iter(partial(slow.recv, 4096), b""))
        assert received.startswith(b"HTTP/1.1 408 ")
        with httpx.Client(base_url=address) as client:  # one that is answered may take its time
            for _ in range(2):
                assert client.post("/tasks/two", json={"inputs": TEXT}).status_code == 200
                time.sleep(0.4)
