"""OpenVINO's folder: what its report says, other methods, and bfloat16."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.export.conftest import TASKS
from tests.export.runners import TEXTS, assert_same
from tests.inference.conftest import save_task
from tests.models import METHODS

from sparsepeft import MultiTaskEngine, SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.export import export_tasks
from sparsepeft.tuners.files import plain_name


def test_the_report_says_what_was_compared(exported_openvino: Path, folders: dict[str, Path]) -> None:
    report = json.loads((exported_openvino / "export.json").read_text())
    assert {"torch", "openvino", "sparsepeft"} <= report["environment"]["versions"].keys()
    assert report["bytes"].keys() >= {"backbone.xml", "backbone.bin", "run.py", "tokenizer.json"}
    for name in TASKS:
        task = report["tasks"][name]
        assert 0 < task["max_deviation"] <= report["tolerance"]
        assert task["num_other_labels"] == 0
        # PEFT's own folder: the engine serves it from here, too.
        stored = exported_openvino / "tasks" / name / "adapter_model.safetensors"
        own, original = (
            {plain_name(key): tensor.tolist() for key, tensor in load_file(path).items()}
            for path in (stored, folders[name] / stored.name)
        )
        assert own == original


OTHERS = {
    "pfeiffer": METHODS["pfeiffer"](num_labels=4),
    "product": SpartanConfig(parent_keys="product", num_parents=49, top_k=3, num_labels=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters(name: str, backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason='needs OpenVINO: pip install "sparsepeft[export-openvino]"')
    from sparsepeft.export.run_openvino import Runner

    folder = save_task(backbone, tmp_path / name, OTHERS[name])
    export_tasks([folder], tmp_path / "out", format="openvino", max_examples=20)
    expected = MultiTaskEngine(backbone, {name: folder}).predict([(name, text) for text in TEXTS])
    assert_same(list(Runner(tmp_path / "out", precision="f32").answer(name, TEXTS)), expected)


def test_bfloat16_is_compared_where_this_machine_has_it(exported_openvino: Path, folders: dict[str, Path]) -> None:
    from sparsepeft.export.openvino_files import has_bfloat16
    from sparsepeft.export.run_openvino import Runner

    report = json.loads((exported_openvino / "export.json").read_text())["tasks"]["topics"]
    if not has_bfloat16():
        assert "bfloat16" not in report
        pytest.skip("this processor has no bfloat16")
    changes = report["bfloat16"]
    results = json.loads((folders["topics"] / "results.json").read_text())
    assert changes["before"] == pytest.approx(results["metrics"]["validation"]["accuracy"])
    assert 0 <= changes["after"] <= 1
    assert report["max_deviation"] < changes["max_deviation"] < 0.05
    scores = [
        [one["score"] for one in Runner(exported_openvino, precision=precision).answer("topics", TEXTS)]
        for precision in ("f32", "bf16", None)
    ]
    assert scores[0] != scores[1] == scores[2]


def test_what_it_cannot_do_is_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="computes in bfloat16 instead"):
        export_tasks([folders["two"]], tmp_path / "out", format="openvino", int8=True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install \"sparsepeft\[export-openvino\]\""):
        export_tasks([folders["two"]], tmp_path / "out", format="openvino")
    assert not (tmp_path / "out").exists()
