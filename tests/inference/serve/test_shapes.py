"""Each shape of requests, asked by the client that speaks it where there is one, and answered as the engine does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient

from sparsepeft import MultiTaskEngine
from sparsepeft.inference import Prediction
from sparsepeft.inference.portable import NO_TOKENS, NOT_FINITE
from sparsepeft_serve import ServeSettings, create_app

TEXT, OTHER = "the striker scored twice", "flour prices kept climbing"


@pytest.fixture(scope="module")
def client(engine: MultiTaskEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServeSettings(default_task="five"))) as client:
        yield client


def ranked(engine: MultiTaskEngine, task: str, text: Any) -> list[tuple[str, float]]:
    (answer,) = engine.predict([(task, text)])
    scores = answer.scores or {"LABEL_0": answer.score}
    return sorted(scores.items(), key=lambda pair: -pair[1])


def same(scores: list[dict[str, Any]], expected: list[tuple[str, float]]) -> bool:
    return [one["label"] for one in scores] == [label for label, _ in expected] and [
        one["score"] for one in scores
    ] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_text_embeddings_inference(client: TestClient, engine: MultiTaskEngine) -> None:
    for inputs, text in ((TEXT, TEXT), ([TEXT], TEXT), ([TEXT, OTHER], (TEXT, OTHER))):
        answer = client.post("/predict", json={"inputs": inputs})
        assert answer.status_code == 200
        assert same(answer.json(), ranked(engine, "five", text))
    batch = client.post("/tasks/two/predict", json={"inputs": [[TEXT], [TEXT, OTHER], [" "]]}).json()
    assert same(batch[0], ranked(engine, "two", TEXT))
    assert same(batch[1], ranked(engine, "two", (TEXT, OTHER)))
    assert batch[2] == {"error": "An input has an empty text; pass some words.", "error_type": "Validation"}
    value = client.post("/tasks/degree/predict", json={"inputs": TEXT}).json()
    assert same(value, ranked(engine, "degree", TEXT))
    raw = client.post("/tasks/two/predict", json={"inputs": TEXT, "raw_scores": True}).json()
    (prediction,) = engine.predict([("two", TEXT)])
    assert sorted(one["score"] for one in raw) == pytest.approx(sorted(prediction.logits))


def test_cutting(client: TestClient, engine: MultiTaskEngine) -> None:
    long = f"{TEXT} " * 30 + f"{OTHER} " * 30
    refused = client.post("/tasks/two/predict", json={"inputs": long})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert "is longer than the 64 tokens" in refused.json()["error"]
    for direction in ("Left", "right"):
        request = {"inputs": long, "truncate": True, "truncation_direction": direction}
        (expected,) = engine.predict([("two", long)], truncation_side=direction.lower())
        assert client.post("/tasks/two/predict", json=request).json()[0]["score"] == pytest.approx(expected.score)


def tensor(*texts: Any, **others: Any) -> dict[str, Any]:
    """A request of the Open Inference Protocol."""
    return {"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts, **others}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/predict", {"inputs": [TEXT] * 3}, 422, "`inputs` has 3 texts for one prediction"),
        ("/predict", {"inputs": []}, 400, "`inputs` is empty"),
        ("/predict", {"inputs": 3}, 422, "`inputs.str` cannot be used"),
        ("/predict", {"inputs": ""}, 422, "empty text"),
        ("/predict", {"inputs": [[TEXT]] * 600}, 422, "at most 512 are answered"),
        ("/predict", {"inputs": TEXT, "truncation_direction": "up"}, 422, "`truncation_direction` cannot be used"),
        ("/tasks/none/predict", {"inputs": TEXT}, 404, "The task 'none' is unknown"),
        ("/tasks/two", {"inputs": [TEXT, ""]}, 422, "empty text"),
        ("/tasks/two", {"inputs": TEXT, "parameters": {"top_k": 0}}, 422, "`parameters.top_k` cannot be used"),
        ("/v1/predict_all", {"inputs": TEXT, "tasks": ["none"]}, 404, "unknown"),
        ("/v1/predict_all", {"inputs": []}, 400, "no input"),
        ("/v2/models/none/infer", tensor(TEXT), 404, "The task 'none' is unknown"),
        ("/v2/models/two/infer", tensor(TEXT) | {"outputs": [{"name": "odds"}]}, 422, "The output 'odds' is unknown"),
        ("/v2/models/two/infer", {"inputs": []}, 422, "`inputs` cannot be used"),
        ("/v2/models/two/infer", tensor(TEXT, shape=[2]), 422, "is BYTES [2] with 1 elements; expected `text`"),
        ("/v2/models/two/infer", tensor(TEXT, datatype="FP32"), 422, "is FP32 [1]"),
        ("/v2/models/two/infer", tensor(3), 422, "as many texts"),
        ("/v2/models/two/infer", tensor(TEXT, ""), 422, "empty text"),
        ("/tasks/two", {"inputs": {"text": TEXT, "textpair": OTHER}}, 422, "Extra inputs"),
        ("/tasks/two", {"inputs": TEXT, "parameters": {"topk": 1}}, 422, "`parameters.topk` cannot be used: Extra"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_what_is_refused(client: TestClient, path: str, body: Any, status: int, words: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_the_hub_client(address: str, engine: MultiTaskEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else it refuses any address
    hub = InferenceClient()
    found = hub.text_classification(TEXT, model=f"{address}/tasks/five", top_k=3)
    assert same([dict(one) for one in found], ranked(engine, "five", TEXT)[:3])
    found = hub.text_classification(TEXT, model=f"{address}/tasks/two", function_to_apply="none")
    (prediction,) = engine.predict([("two", TEXT)])
    assert sorted(one.score for one in found) == pytest.approx(sorted(prediction.logits))
    pair = httpx.post(f"{address}/tasks/two", json={"inputs": {"text": TEXT, "text_pair": OTHER}}).json()
    assert same(pair[0], ranked(engine, "two", (TEXT, OTHER)))


def test_vllm(client: TestClient, engine: MultiTaskEngine, backbone: Path) -> None:
    assert client.post("/classify", json={"model": "five", "input": [True, 2]}).status_code == 422
    ids = engine._encoder.tokenizer(TEXT)["input_ids"]
    for given in (TEXT, [TEXT, OTHER], ids, [ids, ids]):
        for path in ("/classify", "/v1/classify"):
            answer = client.post(path, json={"model": "five", "input": given}).json()
            for one, text in zip(answer["data"], [TEXT, OTHER if OTHER in given else TEXT], strict=False):
                (expected,) = engine.predict([("five", text)])
                assert (one["label"], one["num_classes"]) == (expected.label, 5)
                assert one["probs"] == pytest.approx(list(expected.scores.values()), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == 2 * len(ids)
    one_is_bad = client.post("/classify", json={"model": "two", "input": [TEXT, "", TEXT]}).json()["data"]
    assert [each["error"] is None for each in one_is_bad] == [True, False, True]
    for body, words in (
        ({"model": "none", "input": TEXT}, "unknown"),
        ({"model": "two", "input": []}, "empty"),
        ({"model": "two", "input": [99999]}, "token ids"),
        ({"model": "two", "input": [[]]}, "expected input_ids"),
    ):
        error = client.post("/classify", json=body).json()["error"]
        assert words in error["message"]
    models = client.get("/v1/models").json()["data"]
    assert models[0]["id"] == backbone.name
    assert models[0]["parent"] is None
    assert {one["id"]: one["parent"] for one in models[1:]} == dict.fromkeys(engine.tasks, backbone.name)


def test_open_inference(client: TestClient, engine: MultiTaskEngine) -> None:
    pairs = {"shape": [2, 2], "data": [[TEXT, OTHER], [OTHER, TEXT]]}
    for body, inputs in (
        (tensor(TEXT, OTHER), [TEXT, OTHER]),
        (tensor(TEXT, OTHER, shape=[2, 1]), [TEXT, OTHER]),
        (tensor(**pairs), [(TEXT, OTHER), (OTHER, TEXT)]),
    ):
        expected = engine.predict([("five", one) for one in inputs])
        found = client.post("/v2/models/five/infer", json=body | {"id": "42"}).json()
        assert (found["model_name"], found["id"]) == ("five", "42")
        probs, logits, label = found["outputs"]
        assert (probs["shape"], probs["datatype"]) == ([2, 5], "FP32")
        assert probs["data"] == pytest.approx([score for one in expected for score in one.scores.values()], abs=1e-5)
        assert logits["data"] == pytest.approx([logit for one in expected for logit in one.logits], abs=1e-4)
        assert label == {
            "name": "label",
            "datatype": "BYTES",
            "shape": [2],
            "data": [one.label for one in expected],
        }
    some = client.post("/v2/models/degree/infer", json=tensor(TEXT) | {"outputs": [{"name": "probs"}]}).json()
    assert [output["name"] for output in some["outputs"]] == ["probs"]
    assert some["outputs"][0]["data"] == pytest.approx([engine.predict([("degree", TEXT)])[0].score])
    assert client.post("/v2/models/two/infer", json=tensor(f"{TEXT} " * 60)).status_code == 422
    cut = tensor(f"{TEXT} " * 60) | {"parameters": {"truncate": True}}
    assert client.post("/v2/models/two/infer", json=cut).status_code == 200
    model = client.get("/v2/models/five").json()
    assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [(output["name"], output["shape"]) for output in model["outputs"]] == [
        ("probs", [-1, 5]),
        ("logits", [-1, 5]),
        ("label", [-1]),
    ]
    assert client.get("/v2/models/none/ready").status_code == 404


@pytest.mark.parametrize("binary", [True, False])
def test_the_triton_client(address: str, engine: MultiTaskEngine, binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http], which brings gevent")
    with http.InferenceServerClient(address.removeprefix("http://")) as triton:
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("five")
        assert not triton.is_model_ready("none")
        assert triton.get_server_metadata()["name"] == "sparsepeft"
        assert triton.get_model_metadata("five")["outputs"][0]["name"] == "probs"
        given = http.InferInput("text", [2, 2], "BYTES")
        given.set_data_from_numpy(np.array([[TEXT, "é"], [OTHER, TEXT]], dtype=object), binary_data=binary)
        found = triton.infer("five", [given], request_id="7")
        expected = engine.predict([("five", (TEXT, "é")), ("five", (OTHER, TEXT))])
        np.testing.assert_allclose(found.as_numpy("probs"), [list(one.scores.values()) for one in expected], atol=1e-5)
        assert list(found.as_numpy("label")) == [one.label for one in expected]
        assert found.get_response()["id"] == "7"
        with pytest.raises(Exception, match="The task 'none' is unknown"):
            triton.infer("none", [given])


def test_texts_behind_the_json(client: TestClient, engine: MultiTaskEngine) -> None:
    text = TEXT.encode()
    head = json.dumps(tensor(data=[], shape=[1])).encode()
    for packed, status in ((text, 200), (b"\xff", 422)):
        body = head + len(packed).to_bytes(4, "little") + packed
        headers = {"Inference-Header-Content-Length": str(len(head))}
        answer = client.post("/v2/models/two/infer", content=body, headers=headers)
        assert answer.status_code == status
        if status == 200:
            (expected,) = engine.predict([("two", TEXT)])
            assert answer.json()["outputs"][2]["data"] == [expected.label]
        else:
            assert "not UTF-8" in answer.json()["error"]


def test_kinds_of_errors(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {NO_TOKENS: ("Tokenizer", 422), NOT_FINITE: ("Backend", 424), "An input is long.": ("Validation", 422)}
    failed = iter([Prediction.failed(error) for error in [*kinds, *kinds]])
    monkeypatch.setattr(MultiTaskEngine, "predict", lambda self, requests, **_: [next(failed) for _ in requests])
    batch = client.post("/predict", json={"inputs": [[TEXT]] * 3}).json()
    assert [one["error_type"] for one in batch] == [kind for kind, _ in kinds.values()]
    for kind, status in kinds.values():
        answer = client.post("/predict", json={"inputs": TEXT})
        assert (answer.json()["error_type"], answer.status_code) == (kind, status)


def test_all_tasks_of_a_text(client: TestClient, engine: MultiTaskEngine) -> None:
    inputs = [TEXT, {"text": TEXT, "text_pair": OTHER}]
    expected = [{name: one.to_dict() for name, one in row.items()} for row in engine.predict_all([TEXT, (TEXT, OTHER)])]
    data = client.post("/v1/predict_all", json={"inputs": inputs}).json()["data"]
    for row, wanted in zip(data, expected, strict=True):
        assert {name: one["score"] for name, one in row.items()} == pytest.approx(
            {name: one["score"] for name, one in wanted.items()}, abs=1e-5
        )
    some = client.post("/v1/predict_all", json={"inputs": TEXT, "tasks": ["two", "degree"]}).json()["data"]
    assert some[0].keys() == {"two", "degree"}
    body = {"inputs": [TEXT, "", OTHER] * 100, "tasks": ["two"], "stream": True}
    with client.stream("POST", "/v1/predict_all", json=body) as response:
        assert response.headers["content-type"].startswith("application/x-ndjson")
        lines = [json.loads(line) for line in response.iter_lines()]
    assert [("error" in line["two"]) for line in lines] == [False, True, False] * 100


def test_about(client: TestClient, engine: MultiTaskEngine) -> None:
    assert client.post("/tasks/two/predict", json={"inputs": TEXT}).status_code == 200
    about = client.get("/info").json()
    assert about["tasks"].keys() == engine.tasks.keys()
    assert about["default_task"] == "five"
    assert about["model_type"]["classifier"]["label2id"]["LABEL_4"] == 4
    assert about["tasks"]["degree"]["problem_type"] == "regression"
    assert about["tasks"]["degree"]["thresholds"] is None
    for path in ("/health", "/ping"):
        assert client.get(path).status_code == 200
    metrics = client.get("/metrics").text
    assert '\nte_request_count{method="single"}' in metrics
    assert "te_queue_size 0.0" in metrics
    assert 'sparsepeft_task_inputs_total{task="two"}' in metrics
