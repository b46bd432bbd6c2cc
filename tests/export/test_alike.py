"""A text is answered alike everywhere: by the engine, the predictor, ``predict`` and the runners of exports."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.runners import TEXTS

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.inference import Predictor
from sparsepeft.inference.portable import ExportedTasks
from sparsepeft.scoring import answer
from sparsepeft.scoring.questions import Question

Ask = Callable[[str, Any], dict[str, Any]]  # of a task, for one input: a row with label, score and scores, or an error

SINGLE: list[Any] = [
    TEXTS[0],
    (TEXTS[0],),
    {"text": TEXTS[0]},
    {"text": TEXTS[0], "text_pair": None},
    " ".join(TEXTS),  # longer than the task takes
    "Übergrößen 中文 🙂",
]
PAIRS: list[Any] = [(TEXTS[0], TEXTS[1]), [TEXTS[2], " ".join(TEXTS)], {"text": TEXTS[0], "text_pair": TEXTS[1]}]
NO_INPUTS: list[Any] = [
    *(None, 3, 0.5, float("nan"), b"bytes", [], (), ["a"] * 3, ("a", None), ["a", ["b"]], {}),
    *({"text": None}, {"text": 1}, {"text_pair": "a"}, {"text": "a", "label": 0}),
]
REFUSED = {
    "An input has an empty text; pass some words.": ["", " ", "\n\t", {"text": ""}],
    "expected a text, a pair of texts, or a dictionary with text and text_pair, or with tokens alone.": NO_INPUTS,
    "half of a surrogate pair, which is no character; decode": ["bad \ud83d", {"text": "\ud83d"}],
    "byte at position 1 that is not UTF-8; read it": ["a\udcff"],
    "The task takes 1 text(s) per input, but 2 came; pass as many.": PAIRS,
}


@pytest.fixture(scope="module")
def ways(request: pytest.FixtureRequest, backbone: Path, folders: dict[str, Path]) -> dict[str, Ask]:
    """Every way from text to answer."""
    engine = MultiTaskEngine(backbone, folders)
    predictors = {name: Predictor(folder) for name, folder in folders.items() if (folder / "run.json").exists()}

    def by_predict(name: str, given: Any) -> dict[str, Any]:
        ((one,),) = answer(predictors[name], [Question(given)])
        return one.prediction.to_dict()

    def by_evaluate(name: str, given: Any) -> dict[str, Any]:
        logits = predictors[name].logits([given])[0]
        one = predictors[name].predict([given])[0]
        np.testing.assert_allclose(_probabilities(name, logits), _values(one.to_dict()), atol=1e-6)
        return one.to_dict()

    def by_runner(module: str, fixture: str, **options: Any) -> Ask:
        runner: ExportedTasks = importlib.import_module(module).Runner(request.getfixturevalue(fixture), **options)
        return lambda name, given: next(runner.answer(name, [given]))

    return {
        "engine": lambda name, given: engine.predict([(name, given)])[0].to_dict(),
        "all tasks": lambda name, given: engine.predict_all([given], [name])[0][name].to_dict(),
        "predictor": lambda name, given: predictors[name].predict([given])[0].to_dict(),
        "predict": by_predict,
        "evaluate": by_evaluate,
        "onnx": by_runner("sparsepeft.export.run", "exported"),
        "openvino": by_runner("sparsepeft.export.run_openvino", "exported_openvino", precision="f32"),
    }


def _values(row: dict[str, Any]) -> list[float]:
    return list(row["scores"].values()) or [row["score"]]


def _probabilities(name: str, logits: np.ndarray) -> np.ndarray:
    if name == "likeness":
        return logits
    return 1 / (1 + np.exp(-logits)) if name == "tags" else np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(("task", "inputs"), [("topics", SINGLE), ("tags", SINGLE), ("likeness", PAIRS)])
def test_what_can_be_answered(ways: dict[str, Ask], task: str, inputs: list[Any]) -> None:
    for given in inputs:
        expected = ways["engine"](task, given)
        assert ("labels" in expected) == (task == "tags")
        assert (expected["label"] is None) == (expected["scores"] == {}) == (task == "likeness")
        for ask in ways.values():
            row = ask(task, given)
            assert list(row) == list(expected)
            np.testing.assert_allclose(_values(row), _values(expected), atol=1e-4)
            assert row | {"scores": {}, "score": 0} == expected | {"scores": {}, "score": 0}
    assert ways["engine"]("topics", SINGLE[4])["truncated"]


def test_a_text_is_cut_where_the_tokenizer_cuts(
    exported: Path, backbone: Path, folders: dict[str, Path], tmp_path
) -> None:
    engine, left = MultiTaskEngine(backbone, folders), Path(shutil.copytree(exported, tmp_path / "left"))
    for name in ("topics", "tags"):
        file = left / "tasks" / name / "task.json"
        task = json.loads(file.read_text())
        assert task["truncation_side"] == "right"
        file.write_text(json.dumps(task | {"truncation_side": "left"}))
        runner = importlib.import_module("sparsepeft.export.run").Runner(left)
        found, long = next(runner.answer(name, [SINGLE[4]])), [(name, SINGLE[4])]
        (expected,), (other,) = engine.predict(long, truncation_side="left"), engine.predict(long)
        np.testing.assert_allclose(_values(found), _values(expected.to_dict()), atol=1e-6)
        assert not np.allclose(_values(found), _values(other.to_dict()), atol=1e-6)


def test_what_cannot_be_answered(ways: dict[str, Ask]) -> None:
    refused = [("topics", given, words) for words, inputs in REFUSED.items() for given in inputs]
    refused += [("likeness", TEXTS[0], "The task takes 2 text(s) per input, but 1 came; pass as many.")]
    refused += [("likeness", (TEXTS[0], " "), "An input has an empty text; pass some words.")]
    for task, given, words in refused:
        sentences = {name: _refusal(ask, task, given) for name, ask in ways.items() if name != "evaluate"}
        assert len(set(sentences.values())) == 1, (given, sentences)
        assert words in sentences["engine"]
    for name in ("engine", "all tasks", "onnx", "openvino"):
        assert _refusal(ways[name], "topisc", TEXTS[0]).endswith("tags, topics, two; did you mean 'topics'?")


def _refusal(ask: Ask, task: str, given: Any) -> str:
    try:
        return str(ask(task, given)["error"])
    except ValueError as error:  # a UserError of the library, an InputError of a runner
        return str(error)


def test_data_sets_may_have_empty_texts(folders: dict[str, Path]) -> None:
    """Scoring takes them, as training does; who asks for an answer is told."""
    predictor = Predictor(folders["topics"])
    assert predictor.logits(["", TEXTS[0]]).shape == (2, 5)
    with pytest.raises(UserError, match="empty text"):
        predictor.predict([""])
