"""Which method is recommended, and what the table and the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsepeft.comparison.names import COMPARED, check_names
from sparsepeft.comparison.report import BEST, FAILED, NOISE, WORSE, Compared, Comparison, recommend, write_comparison
from sparsepeft.errors import UserError

BASELINE = {"answer": "ham", "score": 0.5, "standing": WORSE}


def method(name: str, standing: str, score: float, size: int, **changes: Any) -> Compared:
    values = {
        "score": score,
        "interval": (score - 0.1, score + 0.1),
        "scores": (score,),
        "test_score": score,
        "train_seconds": 9.0,
        "trained_parameters": size // 4,
        "file_bytes": size,
        "task_bytes": size + 900,
        "shared_bytes": 90_000_000,
        "latency_ms": 8.0,
        "texts_per_second": 200.0,
    }
    return Compared(name, standing, **(values | changes))


HEAD = method("head", NOISE, 0.85, 1_000)
LORA = method("lora", BEST, 0.9, 500_000)
FULL = method("full", NOISE, 0.89, 90_000_000, shared_bytes=0)
BROKEN = Compared("pfeiffer", FAILED, "The loss became nan at step 4.")


@pytest.mark.parametrize(
    ("methods", "taken", "words"),
    [
        ((HEAD, LORA, FULL), "head", "the smallest (1.90 kB) of the methods within noise of the best score (lora, 0.9"),
        ((LORA, FULL, BROKEN), "lora", "the best score, and of those within noise of it the smallest (500.90 kB)"),
        (
            (method("head", WORSE, 0.6, 1), LORA),
            "lora",
            "Take lora, 0.9000: no other method is within noise of its score",
        ),
        ((method("bitfit", NOISE, 0.9, 500_000, train_seconds=1.0), LORA), "bitfit", "Take bitfit"),
    ],
)
def test_the_smallest_within_noise_of_the_best(methods: tuple[Compared, ...], taken: str, words: str) -> None:
    found, sentence = recommend(methods, BASELINE)
    assert found == taken
    assert words in sentence


def test_none_where_a_constant_answer_is_as_good() -> None:
    for answer, words in (("ham", "always ham"), (2.5, "always 2.5, the mean"), ([], "always no label")):
        found, sentence = recommend((HEAD, LORA), BASELINE | {"answer": answer, "standing": NOISE})
        assert found is None
        assert words in sentence
        assert "try more rows" in sentence


@pytest.fixture
def comparison() -> Comparison:
    methods = (HEAD, LORA, BROKEN)
    return Comparison(
        task="mails",
        metric="accuracy",
        num_rows={"training": 90, "selection": 10, "validation": 30, "test": 50},
        methods=methods,
        baseline=BASELINE,
        recommended="head",
        recommendation=recommend(methods, BASELINE)[1],
        notes=("mails: a note",),
        settings={"model": "a model", "methods": ["head", "lora", "pfeiffer"], "seeds": [1, 2], "interval": "Wilson's"},
        environment={"cpu": "a processor", "threads": 2, "date": "today"},
    )


def test_a_comparison_is_written_as_json_page_and_figure(comparison: Comparison, tmp_path: Path) -> None:
    written = write_comparison(comparison, tmp_path)
    assert [path.name for path in written.files] == [f"comparison.{kind}" for kind in ("json", "md", "png", "svg")]
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content == json.loads(json.dumps(comparison.to_dict()))
    assert (content["measured"], content["seed"], content["results"][2]["error"]) == ("comparison", 1, BROKEN.error)
    page = (tmp_path / "comparison.md").read_text()
    for line in (
        "# mails: accuracy on 30 validation rows, seeds 1, 2",
        "| lora | 0.9000 | 0.800–1.000 | best | 0.9000 | 9.0 s | 500.00 kB | 500.90 kB | 8.0 ms | 200 |",
        "| pfeiffer |  |  | failed |  |  |  |  |  |  |",
        "| always ham | 0.5000 |  | worse |  |  |  |  |  |  |",
        "- pfeiffer failed: The loss became nan at step 4.",
        "- mails: a note",
    ):
        assert line in page.splitlines()


def test_a_test_part_is_a_column_of_its_own(comparison: Comparison) -> None:
    header, rows = comparison.cells()
    assert "test" in header
    del comparison.num_rows["test"]
    fewer, fewer_rows = comparison.cells()
    assert [name for name in header if name != "test"] == fewer
    assert {len(row) for row in rows} == {len(header)}
    assert {len(row) for row in fewer_rows} == {len(fewer)}


def test_names() -> None:
    assert check_names(None, COMPARED) == list(COMPARED)
    assert check_names("topics", ["lora", "head", "lora"]) == ["lora", "head"]
    for task, methods, words in (
        ("lm", COMPARED, "methods are compared on labelled texts"),
        ("topics", ["spartn"], "'spartn' is unknown.*did you mean 'spartan'"),
        ("topics", [], "must be a list with some of"),
        ("topics", "head", "must be a list with some of"),
    ):
        with pytest.raises(UserError, match=words):
            check_names(task, methods)
