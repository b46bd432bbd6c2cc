"""Two tasks on one MPNet: in the engine, and exported for devices without PyTorch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.export.runners import assert_same
from tests.real.models import MPNET, Rows, Trained, find_model

from sparsepeft import MultiTaskEngine
from sparsepeft.export import export_tasks
from sparsepeft.inference.portable import Prediction
from sparsepeft.training import Predictor

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def texts(rows: Rows) -> list[str]:
    """Of many lengths, none of which a task cuts."""
    return [" ".join(row["text"].split()[: 2 + i % 9]) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def folders(trained: Callable[[str, str], Trained], run_of: Callable[[str], Path]) -> dict[str, Path]:
    """One saved by ``save_pretrained``, the other by the command line."""
    return {"saved": trained(MPNET, "spartan").folder, "run": run_of(MPNET)}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], texts: list[str]) -> dict[str, list[Prediction]]:
    """What each task answers in an engine of its own."""
    return {
        name: MultiTaskEngine(find_model(MPNET), {name: folder}).predict([(name, text) for text in texts])
        for name, folder in folders.items()
    }


def _close(found: list[Prediction], expected: list[Prediction], tolerance: float = 1e-5) -> None:
    """Equal up to float32's rounding in sums of another order: batches have other sizes."""
    assert_same([{"label": one.label, "score": one.score, "scores": one.scores} for one in found], expected, tolerance)


def test_a_mixed_batch_answers_as_each_task_alone(
    folders: dict[str, Path], texts: list[str], alone: dict[str, list[Prediction]]
) -> None:
    engine = MultiTaskEngine(find_model(MPNET), folders)
    mixed = engine.predict([(name, text) for text in texts for name in folders])
    for place, name in enumerate(folders):
        _close(mixed[place :: len(folders)], alone[name])
    fanned = engine.predict_all(texts)
    for name in folders:
        _close([answers[name] for answers in fanned], alone[name])
    _close(alone["run"], Predictor(folders["run"]).predict(texts))
    scores = [[list(one.scores.values()) for one in alone[name]] for name in folders]
    assert not np.allclose(*scores, atol=1e-2)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_exported_tasks_answer_as_in_pytorch(
    format: str, folders: dict[str, Path], texts: list[str], alone: dict[str, list[Prediction]], tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    export_tasks(list(folders.values()), tmp_path / "out", format=format, max_examples=20)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    if format == "onnx":
        runner = importlib.import_module("sparsepeft.export.run").Runner(tmp_path / "out")
    else:
        runner = importlib.import_module("sparsepeft.export.run_openvino").Runner(tmp_path / "out", precision="f32")
    for name, folder in folders.items():
        about = report["tasks"][folder.name]
        assert 0 < about["max_deviation"] <= report["tolerance"] == 1e-4
        assert about["num_other_labels"] == 0
        assert_same(list(runner.answer(folder.name, texts)), alone[name])
