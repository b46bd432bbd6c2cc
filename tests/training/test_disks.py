"""Runs on disks that are full or cannot be written to, and in folders that were moved or damaged meanwhile."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.cli.test_cli import sparsepeft
from tests.disks import read_only, small_disk
from tests.tiny import run_config

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.export import export_tasks
from sparsepeft.runs.class_figures import read_report
from sparsepeft.runs.files import HISTORY, RESULTS
from sparsepeft.runs.history import read_history
from sparsepeft.runs.pushing import shared_files
from sparsepeft.training import Predictor, evaluate, train

pytestmark = pytest.mark.slow
Trained = Callable[..., tuple[Path, dict]]
WEIGHTS = "adapter_model.safetensors"


class Fill(hf.TrainerCallback):
    """Fills a disk before a step, or at the end of training."""

    def __init__(self, disk: Path, step: int | None) -> None:
        self.filler, self.step = disk / "filler", step

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.fill()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is None:
            self.fill()


class InterruptAtEnd(hf.TrainerCallback):
    """Stops a run like Ctrl-C does, when its last checkpoint is there."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def _assert_same_weights(folder: Path, expected: Path) -> None:
    found = load_file(folder / WEIGHTS)
    for name, tensor in load_file(expected / WEIGHTS).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (5, r"checkpoint of step 6 could not be written.*last good checkpoint is checkpoint-4\..*Free space"),
        (None, r"trained weights could not be written to .*free space and resume"),
    ],
)
def test_a_disk_that_fills_up_leaves_a_checkpoint_to_go_on_from(
    tiny_backbone: Path, trained: Trained, tmp_path: Path, step: int | None, message: str
) -> None:
    with small_disk(tmp_path / "disk", kib=4096) as disk:
        fill, config = Fill(disk, step), run_config(tiny_backbone, disk / "run", method="spartan")
        with pytest.raises(RunFailed, match=message):
            train(config, callbacks=[fill])
        fill.filler.unlink()
        steps: list[int] = []
        train(config, announce=lambda plan: steps.append(plan.steps_done))
        assert steps == ([] if step is None else [4])  # nothing is left to be trained after the last
        _assert_same_weights(disk / "run", trained(method="spartan")[0])


def test_a_disk_without_room_for_the_frozen_layers_is_named(tiny_backbone: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"cache_frozen_layers": True, "settings": {"layers_to_transform": [1]}, "method": "lora"}
    with small_disk(tmp_path / "disk", kib=256) as disk:
        with pytest.raises(RunFailed, match=r"outputs of the frozen layers need \d.*No space left on device"):
            train(run_config(tiny_backbone, disk / "run", **values))
        assert not list(disk.iterdir())


def test_what_is_written_to_a_full_disk_leaves_what_was_there(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A striker scored.\n")
    with small_disk(tmp_path / "disk", kib=128) as disk:
        (disk / "answers.csv").write_text("before")
        with pytest.raises(RunFailed, match=r"No space left on device.*free space"):
            export_tasks([finished], disk / "export", max_examples=2)
        Fill(disk, None).fill()
        done = sparsepeft("predict", finished, "--file", tmp_path / "texts.txt", "--output", disk / "answers.csv")
        assert done.returncode == 1
        assert re.search(r"answers\.csv could not be written .*No space left on device", done.stderr)
        assert {path.name for path in disk.iterdir()} == {"answers.csv", "filler"}
        assert (disk / "answers.csv").read_text() == "before"


def test_a_folder_that_cannot_be_written_to_answers_and_is_refused_as_output(
    tiny_backbone: Path, finished: Path, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("A striker scored.\n")
    expected = trained(method="spartan")[1]["metrics"]
    with read_only(finished):
        assert evaluate(finished)["test"] == pytest.approx(expected["test"])
        assert WEIGHTS in shared_files(finished, "mine")
        for folder in (finished, finished / "new"):
            with pytest.raises(RunFailed, match=r"cannot be written to .*; pass another `output_dir`"):
                train(run_config(tiny_backbone, folder), overwrite=True)
            with pytest.raises((RunFailed, UserError), match=r"cannot be written to .*; pass another `output_dir`"):
                export_tasks([finished], folder, overwrite=True)
        done = sparsepeft("predict", finished, "--file", tmp_path / "texts.txt", "--output", finished / "answers.csv")
        assert done.returncode == 1
        assert re.search(r"could not be written \(.*Read-only file system", done.stderr)


def test_a_run_that_was_moved_after_its_last_step_keeps_its_best_weights(
    tiny_backbone: Path, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path / "a", method="spartan"), callbacks=[InterruptAtEnd()])
    (tmp_path / "a").rename(tmp_path / "b")
    results = train(run_config(tiny_backbone, tmp_path / "b", method="spartan"))
    assert results["metrics"] == trained(method="spartan")[1]["metrics"]
    _assert_same_weights(tmp_path / "b", trained(method="spartan")[0])


def test_truncated_files_of_a_finished_run_are_named_or_read_as_far_as_they_go(finished: Path) -> None:
    lines = read_history(finished)
    for name in (HISTORY, RESULTS):
        (finished / name).write_bytes((finished / name).read_bytes()[:-20])
    assert read_history(finished) == lines[:-1]
    for read in (read_report, lambda folder: shared_files(folder, "mine")):
        with pytest.raises(UserError, match=rf"{RESULTS} is damaged .*; train again with `overwrite`"):
            read(finished)
    assert Predictor(finished).predict("A striker scored.")
