"""Exported folders: the answers are PyTorch's, whatever the task, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.export.conftest import MEMORY, TASKS
from tests.export.runners import TEXTS, assert_same, run_py
from tests.inference.conftest import save_task
from tests.models import METHODS
from tests.tiny import save_tiny_backbone

from sparsepeft import MultiTaskEngine, SpartanConfig
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.export import export_tasks
from sparsepeft.export.run import Runner
from sparsepeft.inference import portable
from sparsepeft.training import Predictor

SEQ_CLS = MEMORY | {"task_type": "SEQ_CLS"}


def test_the_report_says_what_was_compared(exported: Path) -> None:
    report = json.loads((exported / "export.json").read_text())
    assert report["graph"]["opset"] >= 20
    assert {"torch", "onnx", "onnxruntime", "sparsepeft"} <= report["environment"]["versions"].keys()
    assert report["bytes"]["backbone.onnx"] == (exported / "backbone.onnx").stat().st_size
    for name in TASKS:
        task = report["tasks"][name]
        assert 0 < task["usual_deviation"] <= task["max_deviation"] <= report["tolerance"]
        assert task["num_other_labels"] == 0
        assert task["num_texts"] > 50
        assert "built-in sample" in task["checked_on"]


def test_a_runner_holds_its_runtime_and_the_rest_is_the_librarys(exported: Path) -> None:
    assert (exported / "portable.py").read_bytes() == Path(portable.__file__).read_bytes()
    assert len((exported / "run.py").read_text().splitlines()) <= 50


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
        wide, narrow = (folder / "tasks" / name / "adapter.onnx_adapter" for folder in (exported, exported_int8))
        assert narrow.stat().st_size < wide.stat().st_size
    operators = Counter(node.op_type for node in onnx.load(str(exported_int8 / "backbone.onnx")).graph.node)
    assert operators["MatMulInteger"] == 2 * 6 + 1  # the linear layers of two Transformer layers, and the pooler's
    # Nothing of an adapter became a constant.
    graphs = [{i.name for i in Runner(f).session.get_overridable_initializers()} for f in (exported, exported_int8)]
    assert graphs[0] < graphs[1]
    assert {name.removesuffix("_scale") for name in graphs[1]} == graphs[0]
    done = run_py(exported_int8, "five", TEXTS[0])
    assert json.loads(done.stdout) == next(iter(runner.answer("five", TEXTS[:1]))), done.stderr


OTHERS = {
    # All parents kept, in one layer, with a small head and no norms; pfeiffer is exported for OpenVINO, from ONNX.
    "upper": SpartanConfig(
        num_parents=4, top_k=4, num_labels=3, head_type="linear", temperature=1.6, layers_to_transform=[1]
    ),
    "product": SpartanConfig(parent_keys="product", num_parents=49, top_k=3, num_labels=2, train_layer_norms=True),
    "houlsby": METHODS["houlsby"](num_labels=2),
    "bitfit": METHODS["bitfit"](num_labels=3),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("upper", "product") else pytest.mark.slow) for n in OTHERS]
)
def test_other_adapters(name: str, backbone: Path, tmp_path: Path) -> None:
    folder = save_task(backbone, tmp_path / name, OTHERS[name])
    export_tasks([folder], tmp_path / "out", max_examples=20)
    expected = MultiTaskEngine(backbone, {name: folder}).predict([(name, text) for text in TEXTS])
    assert_same(list(Runner(tmp_path / "out").answer(name, TEXTS)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["roberta", "gpt2"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers as hf

    build = {
        "roberta": lambda **c: hf.RobertaModel(hf.RobertaConfig(**(c | {"max_position_embeddings": 70}))),
        "gpt2": lambda **c: hf.GPT2Model(hf.GPT2Config(**c, n_positions=64, eos_token_id=3, bos_token_id=2)),
    }[architecture]
    backbone = save_tiny_backbone(tmp_path / "backbone", build=build)
    folder = save_task(backbone, tmp_path / "two", SpartanConfig(**(SEQ_CLS | TASKS["two"])))
    export_tasks([folder], tmp_path / "out", max_examples=20)
    expected = MultiTaskEngine(backbone, {"two": folder}).predict([("two", text) for text in TEXTS])
    assert_same(list(Runner(tmp_path / "out").answer("two", TEXTS)), expected)


def test_a_run_of_the_command_line_is_checked_on_its_validation_set(
    exported_int8: Path, folders: dict[str, Path], backbone: Path
) -> None:
    for name, metric in {"topics": "accuracy", "tags": "micro_f1", "likeness": "pearson_spearman"}.items():
        report = json.loads((exported_int8 / "export.json").read_text())["tasks"][name]
        assert report["checked_on"] == "the task's validation set"
        results = json.loads((folders[name] / "results.json").read_text())
        for part in _int8_parts(report):
            assert part["metric"] == metric == results["main_metric"]
            assert part["before"] == pytest.approx(results["metrics"]["validation"][metric], abs=1e-3)
            assert -1 <= part["after"] <= 1
    thresholds = json.loads((folders["tags"] / "results.json").read_text())["thresholds"]
    description = json.loads((exported_int8 / "tasks" / "tags" / "task.json").read_text())
    assert dict(zip(description["labels"], description["thresholds"], strict=True)) == thresholds
    (answer,) = Runner(exported_int8).answer("tags", TEXTS[:1])
    assert answer["labels"] == [name for name, score in answer["scores"].items() if score > thresholds[name]]
    stored = exported_int8 / "tasks" / "topics"
    assert len(Predictor(stored, str(backbone)).predict(TEXTS)) == len(TEXTS)


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
    foreign = save_task(other, tmp_path / "foreign", SpartanConfig(**(SEQ_CLS | TASKS["two"])))
    changed = {
        "top": SpartanConfig(**(SEQ_CLS | TASKS["two"] | {"top_k": 2})),
        "bare": SpartanConfig(**(SEQ_CLS | TASKS["two"] | {"train_layer_norms": False})),
        "adapter": METHODS["pfeiffer"](num_labels=4),
        "product": SpartanConfig(**(SEQ_CLS | TASKS["five"] | {"parent_keys": "product"})),
    }
    saved = {name: save_task(backbone, tmp_path / name, config) for name, config in changed.items()}
    shutil.copytree(folders["two"], tmp_path / "again" / "two")
    two = folders["two"]
    for arguments, options, words in (
        ([], {}, "No folder was given"),
        ([tmp_path / "empty"], {}, "holds no adapter"),
        ([two, tmp_path / "again" / "two"], {}, "have the same name"),
        ([two, saved["top"]], {}, "cannot share one graph: their top_k is 3 and 2"),
        ([two, saved["product"]], {}, "their parent_keys is flat and product"),
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
    with pytest.raises(UserError, match=r"pip install \"sparsepeft\[export-onnx\]\""):
        export_tasks([two], tmp_path / "none")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "none").exists()


def _int8_parts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was found with a task alone in int8, and with the backbone, too."""
    return [report["int8_tasks"], report["int8"]]
