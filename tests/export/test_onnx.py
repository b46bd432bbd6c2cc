"""Exported folders: the answers are PyTorch's, whatever the task, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.engine.conftest import save_task
from tests.export.conftest import MEMORY, TASKS
from tests.models import METHODS
from tests.tiny import run_config, save_tiny_backbone, topics_rows

from sparsepeft import HeadConfig, MultiTaskEngine, SpartanConfig
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.export import export_tasks
from sparsepeft.export.run import Runner
from sparsepeft.predictions import Prediction
from sparsepeft.training import Predictor, train

TEXTS = [" ".join(row["text"].split()[: 3 + 5 * (i % 6)]) for i, row in enumerate(topics_rows("test")[:20])]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))


def assert_same(found: list[dict[str, Any]], expected: list[Prediction], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other.label
        values = list(other.scores.values()) or [other.score]
        np.testing.assert_allclose(list(one["scores"].values()) or [one["score"]], values, atol=tolerance)
        assert one["score"] == pytest.approx(other.score, abs=tolerance)


def run_py(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an exported folder's runner, in a process that fails if it imports more than it may."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "bad = {'torch', 'transformers', 'peft', 'sparsepeft', 'onnx', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    command = [sys.executable, "-c", code, str(folder / "run.py"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=folder.parent)


def test_answers_are_pytorchs_for_any_task_and_batch(exported: Path, backbone: Path, folders: dict[str, Path]) -> None:
    engine, runner = MultiTaskEngine(backbone, folders), Runner(exported)
    assert set(runner.tasks) == set(TASKS)
    for _ in range(2):  # one after the other, and back
        for name in TASKS:
            for texts in (TEXTS, PAIRS, TEXTS[:1]):
                expected = engine.predict([(name, text) for text in texts])
                assert_same(list(runner.answer(name, texts)), expected)
                assert_same(list(runner.answer(name, texts, batch_size=1)), expected)
    answers = {name: [one["scores"] for one in runner.answer(name, TEXTS)] for name in TASKS}
    assert len({str(scores) for scores in answers.values()}) == len(TASKS)


def test_the_runner_is_short_and_needs_three_packages(exported: Path, backbone: Path, folders: dict[str, Path]) -> None:
    assert len((exported / "run.py").read_text().splitlines()) <= 60
    expected = MultiTaskEngine(backbone, folders).predict([("five", text) for text in TEXTS[:3]])
    done = run_py(exported, "five", stdin="\n".join(TEXTS[:3]))
    assert done.returncode == 0, done.stderr
    assert_same([json.loads(line) for line in done.stdout.splitlines()], expected)
    done = run_py(exported, "two", *PAIRS[0])
    assert json.loads(done.stdout)["label"] in ("LABEL_0", "LABEL_1"), done.stderr
    done = run_py(exported, "seven", "text")
    assert done.returncode != 0
    assert "'seven' is unknown; there are degree, five, two" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_or_foreign_adapter_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    adapter = folder / "tasks" / "two" / "adapter.onnx_adapter"
    content = bytearray(adapter.read_bytes())
    content[len(content) // 2] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or belongs to another"):
        list(Runner(folder).answer("two", TEXTS[:1]))
    shutil.copy(folder / "tasks" / "degree" / adapter.name, adapter)
    done = run_py(folder, "two", TEXTS[0])
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert run_py(folder, "five", TEXTS[0]).returncode == 0
    about = folder / "tasks" / "five" / "task.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"graph": "0" * 64}))
    with pytest.raises(ValueError, match="belongs to another"):
        list(Runner(folder).answer("five", TEXTS[:1]))


def test_the_report_says_what_was_compared(exported: Path) -> None:
    report = json.loads((exported / "export.json").read_text())
    assert report["graph"]["opset"] >= 20
    assert {"torch", "onnx", "onnxruntime", "sparsepeft"} <= report["environment"]["versions"].keys()
    assert report["bytes"]["backbone.onnx"] == (exported / "backbone.onnx").stat().st_size
    for name in TASKS:
        task = report["tasks"][name]
        assert 0 < task["max_deviation"] <= report["tolerance"]
        assert task["num_other_labels"] == 0
        assert task["num_texts"] > 50
        assert "built-in sample" in task["checked_on"]


def test_int8(exported: Path, exported_int8: Path, backbone: Path, folders: dict[str, Path]) -> None:
    engine, runner = MultiTaskEngine(backbone, folders), Runner(exported_int8)
    stored = MultiTaskEngine(backbone, {name: exported_int8 / "tasks" / name for name in TASKS})
    report = json.loads((exported_int8 / "export.json").read_text())
    for name in TASKS:
        requests = [(name, text) for text in TEXTS]
        found, read = list(runner.answer(name, TEXTS)), stored.predict(requests)
        for one, two, other in zip(found, read, engine.predict(requests), strict=True):
            # Eight bits of weights and activations: the tiny random model's scores move by a few hundredths.
            assert one["score"] == pytest.approx(other.score, abs=0.15)
            assert two.score == pytest.approx(other.score, abs=0.1)
        deviations = [part["max_deviation"] for part in (report["tasks"][name], *_int8_parts(report["tasks"][name]))]
        assert deviations == sorted(set(deviations))
        sizes = [
            (folder / "tasks" / name / "adapter.onnx_adapter").stat().st_size for folder in (exported, exported_int8)
        ]
        assert sizes[1] < sizes[0]
    operators = Counter(node.op_type for node in onnx.load(str(exported_int8 / "backbone.onnx")).graph.node)
    assert operators["MatMulInteger"] == 2 * 6 + 1  # the linear layers of two Transformer layers, and the pooler's
    # Nothing of an adapter became a constant.
    graphs = [{i.name for i in Runner(f).session.get_overridable_initializers()} for f in (exported, exported_int8)]
    assert graphs[0] < graphs[1]
    assert {name.removesuffix("_scale") for name in graphs[1]} == graphs[0]
    done = run_py(exported_int8, "five", TEXTS[0])
    assert json.loads(done.stdout) == next(iter(runner.answer("five", TEXTS[:1]))), done.stderr


OTHERS = {
    "upper": SpartanConfig(**(MEMORY | TASKS["five"] | {"layers_to_transform": [1], "train_layer_norms": False})),
    "linear": SpartanConfig(num_parents=4, top_k=4, num_labels=3, head_type="linear", temperature=1.6),
    "pfeiffer": METHODS["pfeiffer"](num_labels=4),
    "houlsby": METHODS["houlsby"](num_labels=2),
    "bitfit": METHODS["bitfit"](num_labels=3),
    "head": HeadConfig(num_labels=3, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("upper", "pfeiffer") else pytest.mark.slow) for n in OTHERS]
)
def test_other_adapters(name: str, backbone: Path, tmp_path: Path) -> None:
    folder = save_task(backbone, tmp_path / name, OTHERS[name])
    export_tasks([folder], tmp_path / "out", max_examples=20)
    expected = MultiTaskEngine(backbone, {name: folder}).predict([(name, text) for text in TEXTS])
    assert_same(list(Runner(tmp_path / "out").answer(name, TEXTS)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "gpt2"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers as hf

    build = {
        "roberta": lambda **c: hf.RobertaModel(hf.RobertaConfig(**(c | {"max_position_embeddings": 70}))),
        "distilbert": lambda **c: hf.DistilBertModel(hf.DistilBertConfig(**c, dim=32, n_layers=2, n_heads=2)),
        "gpt2": lambda **c: hf.GPT2Model(hf.GPT2Config(**c, n_positions=64, eos_token_id=3, bos_token_id=2)),
    }[architecture]
    backbone = save_tiny_backbone(tmp_path / "backbone", build=build)
    folder = save_task(backbone, tmp_path / "two", SpartanConfig(**(MEMORY | TASKS["two"])))
    export_tasks([folder], tmp_path / "out", max_examples=20)
    expected = MultiTaskEngine(backbone, {"two": folder}).predict([("two", text) for text in TEXTS])
    assert_same(list(Runner(tmp_path / "out").answer("two", TEXTS)), expected)


def test_a_run_of_the_command_line_is_checked_on_its_validation_set(backbone: Path, tmp_path: Path) -> None:
    train(run_config(backbone, tmp_path / "topics", max_length=16))
    report = export_tasks([tmp_path / "topics"], tmp_path / "out", int8=True)["tasks"]["topics"]
    assert report["checked_on"] == "the task's validation set"
    results = json.loads((tmp_path / "topics" / "results.json").read_text())
    for part in _int8_parts(report):
        assert part["metric"] == "accuracy"
        assert part["before"] == pytest.approx(results["metrics"]["validation"]["accuracy"])
        assert 0 <= part["after"] <= 1
    stored = tmp_path / "out" / "tasks" / "topics"
    assert len(Predictor(stored, str(backbone)).predict(TEXTS)) == len(TEXTS)
    with pytest.raises(ValueError, match="takes 1 text"):
        list(Runner(tmp_path / "out").answer("topics", PAIRS))


def test_what_cannot_be_exported_is_refused_and_leaves_the_last_export(
    backbone: Path, folders: dict[str, Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    other = save_tiny_backbone(tmp_path / "other", seed=3)
    foreign = save_task(other, tmp_path / "foreign", SpartanConfig(**(MEMORY | TASKS["two"])))
    changed = {
        "top": SpartanConfig(**(MEMORY | TASKS["two"] | {"top_k": 2})),
        "bare": SpartanConfig(**(MEMORY | TASKS["two"] | {"train_layer_norms": False})),
        "adapter": METHODS["pfeiffer"](num_labels=4),
    }
    saved = {name: save_task(backbone, tmp_path / name, config) for name, config in changed.items()}
    shutil.copytree(folders["two"], tmp_path / "again" / "two")
    two = folders["two"]
    for arguments, options, words in (
        ([], {}, "No folder was given"),
        ([tmp_path / "empty"], {}, "holds no adapter"),
        ([two, tmp_path / "again" / "two"], {}, "have the same name"),
        ([two, saved["top"]], {}, "cannot share one graph: their top_k is 3 and 2"),
        ([two, saved["adapter"]], {}, "their method is SPARTAN and BOTTLENECK"),
        ([two, saved["bare"]], {}, "bare has no bert"),
        ([two, foreign], {}, "was trained on the backbone"),
        ([two], {"format": "onyx"}, "did you mean 'onnx'"),
        ([two], {"tolerance": 0.0}, "must be a positive number"),
        ([two], {"overwrite": False}, "already holds an export"),
        ([two], {"output_dir": tmp_path / "full"}, "holds other files"),
    ):
        with pytest.raises(UserError, match=words):
            export_tasks(arguments, **({"output_dir": folder, "overwrite": True} | options))
    with pytest.raises(RunFailed, match=r"deviates from PyTorch by .* but at most 1e-12 was allowed"):
        export_tasks([two], folder, overwrite=True, tolerance=1e-12, max_examples=10)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install \"sparsepeft\[onnx\]\""):
        export_tasks([two], tmp_path / "none")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "none").exists()


def _int8_parts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was found with a task alone in int8, and with the backbone, too."""
    return [report["int8_tasks"], report["int8"]]
