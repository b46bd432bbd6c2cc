"""What must not fail others, or be told as something else: tasks that change, broken requests, the log of requests."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from tests.inference.conftest import save_task
from tests.inference.serve.conftest import answering
from tests.models import METHODS

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.inference.folders import named_tasks, task_folders
from sparsepeft_serve import ServeSettings, create_app
from sparsepeft_serve.run import load_engine
from sparsepeft_serve.service import check_weights_format

TEXT = "the striker scored twice"
INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}


@pytest.fixture
def both(backbone: Path, folders: dict[str, Path], token_folders: dict[str, Path]) -> MultiTaskEngine:
    return MultiTaskEngine(backbone, {"two": folders["two"], "five": folders["five"], "names": token_folders["names"]})


def statuses(engine: MultiTaskEngine, change: Callable[[], None], asked: list[tuple[str, Any]]) -> list[int]:
    """Of requests that wait while a task changes."""
    computing, may_answer, predict = threading.Event(), threading.Event(), engine.predict

    def slow(*args: Any, **options: Any) -> Any:
        computing.set()
        assert may_answer.wait(60)
        return predict(*args, **options)

    engine.predict = slow  # type: ignore[method-assign]
    app = create_app(engine)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as to:
            first = asyncio.create_task(to.post("/tasks/five", json={"inputs": TEXT}))
            while not computing.is_set():
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(to.post(path, json=body)) for path, body in asked]
            while len(app.state.service.batcher._jobs) < len(asked):
                await asyncio.sleep(0.001)
            change()
            may_answer.set()
            assert (await first).status_code == 200
            return [(await other).status_code for other in others]

    return asyncio.run(ask())


def test_a_task_that_goes_while_it_is_asked(both: MultiTaskEngine) -> None:
    asked = [
        ("/v1/predict_all", {"inputs": TEXT, "tasks": ["two", "five"]}),
        ("/v1/predict_all", {"inputs": TEXT}),
        ("/tasks/two", {"inputs": TEXT}),
        ("/tasks/five/predict", {"inputs": TEXT}),
        ("/tasks/names", {"inputs": TEXT}),
    ]
    assert statuses(both, lambda: both.remove("two"), asked) == [404, 200, 404, 200, 200]


@pytest.mark.parametrize("other", ["five", "degree", "names"])
def test_a_task_that_is_replaced_while_it_is_asked(
    both: MultiTaskEngine, folders: dict[str, Path], token_folders: dict[str, Path], other: str
) -> None:
    asked = [
        ("/tasks/two", {"inputs": TEXT}),
        ("/tasks/two/predict", {"inputs": [[TEXT], [TEXT]]}),
        ("/classify", {"model": "two", "input": TEXT}),
        ("/v2/models/two/infer", INFER),
        ("/v1/predict_all", {"inputs": TEXT}),
    ]
    folder = (folders | token_folders)[other]
    assert statuses(both, lambda: both.replace("two", folder), asked) == [503, 503, 503, 503, 200]


def test_broken_requests(both: MultiTaskEngine) -> None:
    with TestClient(create_app(both, ServeSettings(default_task="two")), raise_server_exceptions=False) as client:

        def refused(path: str, status: int, words: str, **given: Any) -> None:
            answer = client.post(path, **given)
            assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text

        as_json = {"Content-Type": "application/json"}
        refused("/predict", 400, "is no JSON", content=b"\xff{", headers=as_json)
        refused("/predict", 400, "is no JSON", content=b"[" * 100_000, headers=as_json)
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl says of --data
        refused("/predict", 422, "send an object of JSON with", content=b'{"inputs": "a"}', headers=form)
        refused("/health", 405, "POST /health")
        assert client.post("/health").headers["allow"] == "GET"
        refused("/v1/predict_all", 422, "names no task", json={"inputs": TEXT, "tasks": [], "stream": True})
        refused("/v1/predict_all", 400, "no input", json={"inputs": [], "stream": True})

        infer = "/v2/models/two/infer"
        head = json.dumps({"inputs": [INFER["inputs"][0] | {"data": []}]}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        refused(infer, 422, "would end at byte 104", content=head + b"\x64\0\0\0cut", headers=length)
        refused(infer, 422, "would end at byte 5", content=head + b"\1\0", headers=length)
        refused(infer, 422, "`parameters.truncate`", json=INFER | {"parameters": {"truncate": "sometimes"}})
        many = {"Inference-Header-Content-Length": "9" * 5000}
        assert client.post(infer, content=json.dumps(INFER).encode(), headers=many).status_code == 200

        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("broken")

        client.app.state.service.task = broken  # type: ignore[attr-defined]
        refused("/predict", 500, "its log says why", json={"inputs": TEXT})
    both.remove("two")
    with TestClient(create_app(both, ServeSettings(default_task="two"))) as client:
        assert client.get("/info").status_code == 200
    for name in ("five", "names"):
        both.remove(name)
    with TestClient(create_app(both)) as client:
        assert "no task yet" in client.post("/predict", json={"inputs": TEXT}).json()["error"]


def test_a_refused_text_is_no_success(both: MultiTaskEngine) -> None:
    with TestClient(create_app(both)) as client:
        assert client.post("/tasks/two", json={"inputs": ""}).status_code == 422
        metrics = client.get("/metrics").text
    assert 'te_request_failure{err="validation"} 1.0' in metrics
    assert "te_request_success{" not in metrics


def test_the_log_and_the_shape_of_early_errors(both: MultiTaskEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsepeft_serve.requests")
    settings = ServeSettings(default_task="two", payload_limit=1000)
    with answering(both, settings) as address, httpx.Client(base_url=address) as client:
        assert client.get("/page/").status_code == 200
        error = client.post("/v1/classify", json={"input": "a" * 2000}).json()["error"]
        assert error["code"] == 413
        assert client.get("/predict").status_code == 405
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("requests")]
    assert {line["path"]: line["status"] for line in lines} == {"/page/": 200, "/v1/classify": 413, "/predict": 405}


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "[", "x"])
def test_the_host_opens_nothing(both: MultiTaskEngine, host: str) -> None:
    with TestClient(create_app(both, ServeSettings(tokens=("a" * 32,)))) as client:
        assert client.get("/info", headers={"Host": host}).status_code == 401


def test_folders_that_are_not_used(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "tasks"
    save_task(backbone, root / "two", METHODS["spartan"](num_labels=2))
    shutil.copytree(root / "two", root / "closed")
    is_file = Path.is_file

    def checked(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_file", checked)
        assert task_folders(root).keys() == {"two"}
    (root / "closed").rename(tmp_path / "outside")
    (root / "linked").symlink_to(tmp_path / "outside")
    assert named_tasks([], root).keys() == {"two"}
    assert "linked was left out, as it leads out of the folder" in caplog.text
    (root / "linked").unlink()

    weights = root / "two" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    check_weights_format(root / "two")  # which is not read
    weights.rename(weights.with_stem("other"))
    with pytest.raises(UserError, match=r"its weights in adapter_model\.bin, but only safetensors are read"):
        check_weights_format(root / "two")

    save_task(backbone, root / "same", METHODS["spartan"](id2label={0: "a", 1: "b", 2: "a"}))
    with pytest.raises(UserError, match="two labels named 'a'"):
        MultiTaskEngine(backbone, {"same": root / "same"})


def test_the_tasks_folder_at_the_start(backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "tasks"
    for name in ("broken", "whole"):
        save_task(backbone, root / name, METHODS["spartan"](num_labels=2))
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"garbage")
    (root / "tuned").mkdir()
    (root / "tuned" / "run.json").write_text("{}")  # of a run without an adapter, here not a whole one
    tasks = task_folders(root)
    assert tasks.keys() == {"broken", "tuned", "whole"}
    engine = load_engine(tasks, None, root, dtype="fp32", token_budget=64)  # on the backbone that the adapters name
    assert list(engine.tasks) == ["whole"]
    told = [line.split(": ")[:2] for line in caplog.messages if line.startswith("task ")]
    assert told == [["task broken", "left out"], ["task tuned", "left out"]]
    with pytest.raises(UserError, match="could not be loaded"):
        load_engine(tasks, str(backbone), dtype="fp32", token_budget=64)  # named one by one


def test_a_text_of_too_many_parts(both: MultiTaskEngine) -> None:
    with TestClient(create_app(both)) as client:
        body = {"inputs": "the " * 20_000, "parameters": {"stride": 61}}
        answer = client.post("/tasks/names", json=body)
    assert answer.status_code == 422
    assert "19939 parts of at most 62 tokens; at most 1024 are read" in answer.json()["error"]
