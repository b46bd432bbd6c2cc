"""The command line on the real models, each command in a process of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.real.conftest import sparsepeft
from tests.real.models import GEMMA, MPNET, Rows, find_model

from sparsepeft.tasks import TaskData
from sparsepeft.training import Predictor

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", [MPNET, GEMMA])
def test_a_classifier_is_trained_evaluated_asked_and_inspected(
    name: str, run_of: Callable[[str], Path], rows: Rows, news: TaskData
) -> None:
    folder = run_of(name)
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 4
    found = json.loads(sparsepeft("evaluate", folder, "--json"))
    assert {part: found[part] for part in results["metrics"]} == results["metrics"]

    texts = [row["text"] for row in rows]
    lines = sparsepeft("predict", folder, stdin="\n".join(texts)).splitlines()
    answers = [json.loads(line) for line in lines]
    assert {frozenset(one["scores"]) for one in answers} == {frozenset(news.spec.label_names)}
    hits = [one["label"] == news.spec.label_names[row["label"]] for one, row in zip(answers, rows, strict=True)]
    assert sum(hits) / len(rows) == pytest.approx(results["metrics"]["validation"]["accuracy"])
    expected = Predictor(folder).predict(texts)
    assert [one["label"] for one in answers] == [other.label for other in expected]

    report = json.loads(sparsepeft("inspect", folder, "--json"))
    assert [layer["index"] for layer in report["layers"]] == list(range(12 if name == MPNET else 18))
    assert all(len(layer["parents"]) == 16 for layer in report["layers"])
    assert all(layer["gate_entropy"] > 0 for layer in report["layers"])


def test_gemma_as_a_sparse_language_model(news: TaskData, tmp_path: Path) -> None:
    text = tmp_path / "news.txt"
    text.write_text(" ".join(" ".join(news.train[:8]["text"]).split()[:300]), encoding="utf-8")
    sparsepeft(
        *("train", "--task", "lm", "--model", find_model(GEMMA), "--text", text, "--validation-text", text),
        *("--output-dir", tmp_path / "lm", "--block-length", 64, "--batch-size", 1, "--max-steps", 6, "--spt"),
        *("--learning-rate", 1e-3, "--spt-set", "top_l=0.5", "--spt-set", "num_active_blocks=0.75"),
    )
    results = json.loads((tmp_path / "lm" / "results.json").read_text())
    before = {kind: values["perplexity"] for kind, values in results["before"].items()}
    assert before["dense"] < before["sparse"]
    assert results["score"] < before["sparse"]  # of what was trained on: six steps teach nothing about other news
    found = json.loads(sparsepeft("evaluate", tmp_path / "lm", "--json"))
    assert found["validation"]["perplexity"] == pytest.approx(results["score"], rel=1e-4)
    assert math.isfinite(results["score"])
