"""`torchrun -m sparsepeft_cli train` with two processes: one run, as a single process trains it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_cli import ran
from tests.tiny import run_config, save_tiny_backbone

from sparsepeft.inference import Predictor
from sparsepeft.runs.folder import has_checkpoint
from sparsepeft.training import train

pytestmark = pytest.mark.slow
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "SPARSEPEFT_DATA"} | {"OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {"max_steps": 20, "eval_steps": 10, "max_train_samples": 160, "save_dtype": "bf16"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"), **NO_DROPOUT)


def command(folder: Path, backbone: Path, *options: object) -> list[str]:
    """What starts two processes, as a user does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--task", "topics", "--model", backbone, "--output-dir", folder, *options]
    return [*launcher, "-m", "sparsepeft_cli", "train", *map(str, arguments)]


def start(*arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def test_a_run_of_two_processes_is_the_run_of_one(backbone: Path, tmp_path: Path) -> None:
    upper = {"layers_to_transform": [1]}
    config = run_config(backbone, tmp_path / "one", cache_frozen_layers=True, settings=upper, **SETTINGS)
    alone = train(config)
    options = [word for key, value in SETTINGS.items() for word in (f"--{key.replace('_', '-')}", value)]
    options += ["--cache-frozen-layers", "--set", "layers_to_transform=[1]", "--batch-size", 8, "--json"]
    together = start(tmp_path / "two", backbone, *options)
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("20 steps of 8") == 1  # told by the first process, for all
    results = json.loads(together.stdout)
    assert results == json.loads((tmp_path / "two" / "results.json").read_text())
    for name in ("score", "selection_score", "best_step", "metrics", "num_rows", "saved_bytes"):
        assert results[name] == alone[name], name
    assert (results["processes"], alone["processes"]) == (2, 1)

    def losses(folder: str) -> list[float]:
        lines = map(json.loads, (tmp_path / folder / "history.jsonl").read_text().splitlines())
        return [value for line in lines for key, value in line.items() if key in ("loss", "eval_loss")]

    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    weights = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-2, rtol=0, msg=name)  # of bfloat16
    assert [each.error for each in Predictor(tmp_path / "two").predict(["the match"])] == [None]
    again = start(tmp_path / "two", backbone, *options)
    assert again.returncode != 0
    assert "already holds a finished run" in again.stderr


def test_what_two_processes_cannot_share(backbone: Path, tmp_path: Path) -> None:
    refused = start(tmp_path / "odd", backbone, "--batch-size", 5, "--max-steps", 2)
    assert refused.returncode != 0
    assert "pass a multiple of 2" in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "odd").exists()


def test_a_run_of_two_processes_is_stopped_and_goes_on_in_one(backbone: Path, tmp_path: Path) -> None:
    # Rows that fill the batches: processes fill up a last one that is short, which one process leaves as it is.
    options = ["--max-steps", 300, "--eval-steps", 100, "--batch-size", 8, "--max-train-samples", 160]
    folder = tmp_path / "out"
    process = subprocess.Popen(command(folder, backbone, *options), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    checkpoints = folder / "unfinished" / "checkpoints"
    deadline = time.monotonic() + 300
    while not has_checkpoint(folder):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # which torchrun hands on to both, at two moments
    process.communicate(timeout=120)
    done = max(int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*"))
    assert 100 <= done < 300
    told = ran("train", "--task", "topics", "--model", backbone, "--output-dir", folder, *options).stderr
    assert f"going on from step {done}" in told
    ran("train", "--task", "topics", "--model", backbone, "--output-dir", tmp_path / "whole", *options)
    weights = [load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "whole")]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-3, rtol=0, msg=name)
