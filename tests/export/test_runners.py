"""The runners of exported folders: PyTorch's answers, whatever the task, and nothing from damaged files."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.export.conftest import TASKS
from tests.export.runners import PAIRS, TEXTS, assert_same, run_py

from sparsepeft import MultiTaskEngine


@dataclass(frozen=True)
class Exported:
    """An exported folder in float32; ``runner`` opens one, ``weights`` is the file of a task that it reads.

    ``tolerance`` is that of ``run.py`` by itself, which may choose bfloat16.
    """

    folder: Path
    runner: Any
    weights: str
    needs: tuple[str, ...]
    tolerance: float


@pytest.fixture(params=["onnx", "openvino"])
def exported_in(request: pytest.FixtureRequest) -> Exported:
    if request.param == "onnx":
        runner = importlib.import_module("sparsepeft.export.run").Runner
        return Exported(request.getfixturevalue("exported"), runner, "adapter.onnx_adapter", ("onnxruntime",), 1e-4)
    folder = request.getfixturevalue("exported_openvino")
    runner = partial(importlib.import_module("sparsepeft.export.run_openvino").Runner, precision="f32")
    return Exported(folder, runner, "adapter_model.safetensors", ("openvino", "safetensors"), 2e-2)


def test_answers_are_pytorchs_for_any_task_and_batch(
    exported_in: Exported, backbone: Path, folders: dict[str, Path]
) -> None:
    engine, runner = MultiTaskEngine(backbone, folders), exported_in.runner(exported_in.folder)
    assert runner.tasks.keys() == folders.keys()
    for _ in range(2):  # one after the other, and back
        for name in TASKS:
            for texts in (TEXTS, PAIRS, TEXTS[:1]):
                expected = engine.predict([(name, text) for text in texts])
                assert_same(list(runner.answer(name, texts)), expected)
                assert_same(list(runner.answer(name, texts, batch_size=1)), expected)
    first, second = (runner.answer(name, TEXTS, batch_size=4) for name in ("two", "five"))  # both at once
    mixed = [one for both in zip(first, second, strict=True) for one in both]
    assert_same(mixed, engine.predict([(name, text) for text in TEXTS for name in ("two", "five")]))
    answers = {name: [one["scores"] for one in runner.answer(name, TEXTS)] for name in TASKS}
    assert len({str(scores) for scores in answers.values()}) == len(TASKS)


def test_the_runner_needs_few_packages(exported_in: Exported, backbone: Path, folders: dict[str, Path]) -> None:
    ask = partial(run_py, exported_in.folder, needs=exported_in.needs)
    expected = MultiTaskEngine(backbone, folders).predict([("five", text) for text in TEXTS[:3]])
    done = ask("five", stdin="\n".join(TEXTS[:3]))
    assert done.returncode == 0, done.stderr
    assert_same([json.loads(line) for line in done.stdout.splitlines()], expected, exported_in.tolerance)
    done = ask("topics", stdin=f"\ufeff\n{TEXTS[0]}\n{TEXTS[0].replace(' ', chr(9))}\n\udcff bad\n")
    first, second, third, fourth = map(json.loads, done.stdout.splitlines())
    assert "empty text" in first["error"]
    assert second["label"] in ("business", "health", "science", "sport", "travel")
    assert third["label"] == second["label"]  # a tab is white space where no second text is expected
    assert "a byte at position 0 that is not UTF-8" in fourth["error"]
    assert done.returncode == 1
    assert "2 inputs could not be answered" in done.stderr
    done = ask("two", *PAIRS[0])
    assert json.loads(done.stdout)["label"] in ("LABEL_0", "LABEL_1"), done.stderr
    done = ask("seven", "text")
    assert done.returncode != 0
    assert "The task 'seven' is unknown; valid are degree, five, likeness, tags, topics, two" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_or_foreign_adapter_is_refused(exported_in: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported_in.folder, folder)
    adapter = folder / "tasks" / "two" / exported_in.weights
    content = bytearray(adapter.read_bytes())
    content[len(content) // 2] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or belongs to another"):
        list(exported_in.runner(folder).answer("two", TEXTS[:1]))
    shutil.copy(folder / "tasks" / "degree" / adapter.name, adapter)
    done = run_py(folder, "two", TEXTS[0], needs=exported_in.needs)
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert run_py(folder, "five", TEXTS[0], needs=exported_in.needs).returncode == 0
    about = folder / "tasks" / "five" / "task.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"graph": "0" * 64}))
    with pytest.raises(ValueError, match="belongs to another"):
        list(exported_in.runner(folder).answer("five", TEXTS[:1]))
