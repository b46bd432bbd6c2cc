"""Tasks that label tokens, exported beside tasks of texts: entities with their places as PyTorch has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tests.export.conftest import MEMORY
from tests.export.runners import TEXTS, assert_same, run_py
from tests.inference.conftest import NAMES, save_task
from tests.inference.test_token_tasks import EVERYTHING
from tests.models import METHODS
from tests.tiny import run_config, save_tiny_backbone
from tests.training.test_token_run import write_conll

from sparsepeft import MultiTaskEngine, SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.export import export_tasks
from sparsepeft.inference.portable import ExportedTasks, Prediction
from sparsepeft.training import Predictor, train

STRIDES = {"names": 15, "words": 5}  # a quarter of 64 and 24, less the special tokens
SETTINGS = MEMORY | {"num_parents": 6}


@pytest.fixture(scope="module")
def kinds(backbone: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds of tasks: saved adapters and runs."""
    root = tmp_path_factory.mktemp("kinds")
    config = SpartanConfig(**(SETTINGS | {"id2label": NAMES, "task_type": "TOKEN_CLS"}))
    names = save_task(backbone, root / "names", config)
    file = str(write_conll(root / "train.conll", "train", 60))
    train(run_config(backbone, root / "words", task="custom", train_file=file, settings=SETTINGS, max_length=24))
    # Another number of labels than the backbone's first, of which a head for tokens is made.
    return {"topics": folders["topics"], "names": names, "two": folders["two"], "words": root / "words"}


def runner_of(format: str, folder: Path) -> ExportedTasks:
    if format == "openvino":
        from sparsepeft.export.run_openvino import Runner

        return Runner(folder, precision="f32")
    from sparsepeft.export.run import Runner as OnnxRunner

    return OnnxRunner(folder)


def assert_same_entities(found: list[dict[str, Any]], expected: list[Prediction]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [(e["label"], e["word"], e["start"], e["end"]) for e in one["entities"]] == [
            (e.label, e.word, e.start, e.end) for e in other.entities or ()
        ]
        assert [e["score"] for e in one["entities"]] == pytest.approx([e.score for e in other.entities or ()], abs=1e-4)
        assert one.get("truncated", False) == other.truncated


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_both_kinds_share_a_graph(format: str, kinds: dict[str, Path], backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if format == "openvino" else "onnxruntime")
    out = tmp_path / "out"
    report = export_tasks(list(kinds.values()), out, format=format, max_examples=30)
    for task in report["tasks"].values():
        assert task["num_other_labels"] == 0
        assert task["max_deviation"] <= 1e-4
    engine, runner = MultiTaskEngine(backbone, kinds), runner_of(format, out)
    stored = MultiTaskEngine(backbone, {name: out / "tasks" / name for name in kinds})
    texts = ["one two", *(text.lower() for text in TEXTS[:8])]
    for name in (*kinds, *reversed(kinds)):  # each after another
        requests = [(name, text) for text in texts]
        expected = engine.predict(requests, stride=STRIDES.get(name))
        assert stored.predict(requests, stride=STRIDES.get(name)) == expected
        answers = list(runner.answer(name, texts))
        (assert_same_entities if engine.tasks[name].labels_tokens else assert_same)(answers, expected)
    long = [" ".join(texts * times) for times in (3, 1, 2)]
    for name, stride in STRIDES.items():
        expected = engine.predict([(name, text) for text in long], **EVERYTHING, stride=stride)
        assert len(expected[0].entities or ()) == 3 * len(expected[1].entities or ()) > 3 * 64
        assert_same_entities(list(runner.answer(name, long, batch_size=2, joined=False)), expected)
    assert_same_entities(list(runner.answer("words", long)), Predictor(kinds["words"]).predict(long))
    alone = run_py(out, "words", texts[1], needs={"onnxruntime"} if format == "onnx" else {"openvino", "safetensors"})
    found = json.loads(alone.stdout)["entities"]
    for one, other in zip(found, next(runner.answer("words", texts[1:2]))["entities"], strict=True):
        assert one == other | {"score": pytest.approx(other["score"], abs=0.01)}  # OpenVINO may compute in bfloat16
    assert not list(out.glob("backbone*2*"))  # one backbone


def test_int8_and_tokens_alone(kinds: dict[str, Path], backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    alone = export_tasks([kinds["words"]], tmp_path / "alone", int8=True, max_examples=20)
    both = export_tasks([kinds["two"], kinds["words"]], tmp_path / "both", int8=True, max_examples=20)
    assert both["tasks"]["two"]["int8"]["max_deviation"] < 0.2
    for report in (alone, both):
        changes = report["tasks"]["words"]["int8"]
        assert (changes["metric"], 0 <= changes["before"] <= 1, 0 <= changes["after"] <= 1) == ("f1", True, True)
    with pytest.raises(UserError, match="The split of custom 'test' is unknown; valid are validation"):
        export_tasks([kinds["words"]], tmp_path / "no", split="test")
    for folder in ("both", "alone"):
        found = list(runner_of("onnx", tmp_path / folder).answer("words", TEXTS[:4]))
        assert all(set(one) <= {"entities", "truncated"} for one in found)


def test_heads_of_several_layers(tmp_path: Path) -> None:
    """RoBERTa's head for texts has a layer before its output, of which a task of tokens knows nothing."""
    pytest.importorskip("onnxruntime")
    build = lambda **c: hf.RobertaModel(hf.RobertaConfig(**c))  # noqa: E731
    backbone = save_tiny_backbone(tmp_path / "roberta", build=build, max_positions=66)
    made = {
        "two": METHODS["pfeiffer"](num_labels=2),
        "names": METHODS["pfeiffer"](id2label=NAMES, task_type="TOKEN_CLS"),
    }
    folders = {name: save_task(backbone, tmp_path / name, config) for name, config in made.items()}
    export_tasks(list(folders.values()), tmp_path / "out", max_examples=20)
    engine, runner = MultiTaskEngine(backbone, folders), runner_of("onnx", tmp_path / "out")
    for name, check in (("two", assert_same), ("names", assert_same_entities)):
        check(list(runner.answer(name, TEXTS[:6])), engine.predict([(name, text) for text in TEXTS[:6]]))


def test_executorch_is_refused(kinds: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason='needs ExecuTorch: pip install "sparsepeft[export-executorch]"')
    with pytest.raises(UserError, match="labels tokens, but a program for ExecuTorch has the logits of whole texts"):
        export_tasks([kinds["names"]], tmp_path / "out", format="executorch")
