"""Tasks that label tokens over HTTP: huggingface_hub's own client, ours, and those that ask for scores of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient
from tests.inference.serve.conftest import answering

from sparsepeft import MultiTaskEngine
from sparsepeft_serve import create_app

TEXT, OTHER = "the striker scored twice", "flour prices kept climbing"


@pytest.fixture(scope="module")
def both(backbone: Path, folders: dict[str, Path], token_folders: dict[str, Path]) -> MultiTaskEngine:
    return MultiTaskEngine(backbone, {"names": token_folders["names"], "two": folders["two"]})


@pytest.fixture(scope="module")
def client(both: MultiTaskEngine) -> Iterator[TestClient]:
    with TestClient(create_app(both)) as client:
        yield client


def test_the_hub_client(both: MultiTaskEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else it refuses any address
    long = f"{TEXT}. " * 30
    given: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {}),
        (TEXT, {"aggregation_strategy": "none", "ignore_labels": []}),
        (TEXT, {"aggregation_strategy": "max", "ignore_labels": ["PER", "LOC", "O"]}),
        (long, {}),
        (long, {"aggregation_strategy": "simple", "stride": 10}),
    ]
    with answering(both) as address:
        for text, parameters in given:
            found = InferenceClient().token_classification(text, model=f"{address}/tasks/names", **parameters)
            (expected,) = both.predict([("names", text)], **parameters)
            is_alone = parameters.get("aggregation_strategy") == "none"
            assert [(one.entity if is_alone else one.entity_group, one.word, one.start, one.end) for one in found] == [
                (one.label, one.word, one.start, one.end) for one in expected.entities or ()
            ]
            assert [one.score for one in found] == pytest.approx([one.score for one in expected.entities or ()])
            assert all((one.entity is None) != is_alone for one in found)


def test_several_texts_and_all_tasks(client: TestClient, both: MultiTaskEngine) -> None:
    expected = [one.to_dict()["entities"] for one in both.predict([("names", TEXT), ("names", OTHER)])]
    found = client.post("/tasks/names", json={"inputs": [TEXT, OTHER]}).json()
    assert [[one["entity_group"] for one in each] for each in found] == [
        [one["label"] for one in each] for each in expected
    ]
    (row,) = client.post("/v1/predict_all", json={"inputs": TEXT}).json()["data"]
    assert row.keys() == {"names", "two"}
    assert [one | {"score": 0} for one in row["names"]["entities"]] == [one | {"score": 0} for one in expected[0]]
    (pair,) = client.post("/v1/predict_all", json={"inputs": {"text": TEXT, "text_pair": OTHER}}).json()["data"]
    assert pair.keys() == {"two"}
    tasks = client.get("/info").json()["tasks"]
    assert [tasks[name]["problem_type"] for name in ("names", "two")] == [
        *("token_classification", "single_label_classification")
    ]
    assert client.post("/v1/memories", json={"inputs": TEXT, "task": "names"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tasks/names/predict", {"inputs": TEXT}, "labels tokens, and was asked for the scores of a text"),
        ("/classify", {"input": TEXT, "model": "names"}, "labels tokens, and was asked for the scores of a text"),
        ("/tasks/names", {"inputs": TEXT, "parameters": {"top_k": 2}}, "labels tokens and takes aggregation_strategy"),
        ("/tasks/two", {"inputs": TEXT, "parameters": {"stride": 2}}, "labels texts and takes top_k"),
        ("/tasks/names", {"inputs": TEXT, "parameters": {"aggregation_strategy": "best"}}, "cannot be used"),
        ("/tasks/names", {"inputs": TEXT, "parameters": {"stride": 62}}, "at most 62 tokens"),
        ("/tasks/names", {"inputs": {"text": TEXT, "text_pair": OTHER}}, "takes 1 text(s)"),
    ],
)
def test_what_is_refused(client: TestClient, path: str, body: Any, words: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert words in (error if isinstance(error, str) else error["message"])


def test_each_token_of_a_text_that_may_be_read_in_parts(client: TestClient) -> None:
    parameters = {"aggregation_strategy": "none", "ignore_labels": []}
    whole, parts = (
        client.post("/tasks/names", json={"inputs": TEXT, "parameters": parameters | more})
        for more in ({}, {"stride": 2})
    )
    assert whole.status_code == parts.status_code == 200
    assert [each["start"] for each in parts.json()] == [each["start"] for each in whole.json()]
