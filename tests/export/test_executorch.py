"""One ExecuTorch program for several tasks; without ExecuTorch, an error that says what is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sparsepeft.errors import UserError
from sparsepeft.export import export_tasks

_INSTALLED = importlib.util.find_spec("executorch") is not None


def test_what_it_cannot_do_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`format=onnx`"):
        export_tasks([folders["two"]], tmp_path / "out", format="executorch", int8=True)
    if _INSTALLED:
        pytest.skip("ExecuTorch is installed")
    with pytest.raises(UserError, match=r"executorch, which is not.*\"sparsepeft\[export-executorch\]\""):
        export_tasks([folders["two"]], tmp_path / "out", format="executorch")


@pytest.mark.slow
@pytest.mark.skipif(not _INSTALLED, reason='needs ExecuTorch: pip install "sparsepeft[export-executorch]"')
def test_one_program_answers_like_pytorch_for_all_tasks(folders: dict[str, Path], tmp_path: Path) -> None:
    export_tasks(list(folders.values()), tmp_path / "out", format="executorch", max_examples=20)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [path.name for path in (tmp_path / "out").rglob("*.pte")] == ["backbone.pte"]
    assert report["tasks"].keys() == folders.keys()
    for task in report["tasks"].values():
        assert task["num_texts"] == 20
        assert task["num_other_labels"] == 0
        assert task["max_deviation"] <= 1e-4
