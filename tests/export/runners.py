"""Asking exported folders, and comparing what they answer with PyTorch's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import topics_rows

from sparsepeft.inference.portable import Prediction

TEXTS = [" ".join(row["text"].split()[: 3 + 5 * (i % 6)]) for i, row in enumerate(topics_rows("test")[:20])]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
_FOREIGN = {"torch", "transformers", "peft", "sparsepeft", "onnx", "onnxruntime", "openvino", "safetensors"}


def assert_same(found: list[dict[str, Any]], expected: list[Prediction], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other.label
        values = list(other.scores.values()) or [other.score]
        np.testing.assert_allclose(list(one["scores"].values()) or [one["score"]], values, atol=tolerance)
        assert one["score"] == pytest.approx(other.score, abs=tolerance)


def run_py(
    folder: Path, *arguments: str, needs: Iterable[str] = ("onnxruntime",), stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run an exported folder's runner, in a process that fails if it imports more than it ``needs``."""
    code = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = {str(folder)!r}; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        f"bad = {_FOREIGN - {*needs}} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    command = [sys.executable, "-c", code, str(folder / "run.py"), *arguments]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as most systems have it
    text = {"encoding": "utf-8", "errors": "surrogateescape"}
    return subprocess.run(command, input=stdin, capture_output=True, check=False, cwd=folder.parent, env=strict, **text)
