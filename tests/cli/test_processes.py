"""`torchrun -m sparsepeft_cli train` with two processes: one run, as a single process trains it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_cli import ran
from tests.tiny import run_config, save_tiny_backbone

from sparsepeft import launch
from sparsepeft.errors import UserError
from sparsepeft.inference import Predictor
from sparsepeft.runs.folder import has_checkpoint
from sparsepeft.training import train
from sparsepeft.training.fit import _check_sharded

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "SPARSEPEFT_DATA"} | {"OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {"max_steps": 20, "eval_steps": 10, "max_train_samples": 160, "save_dtype": "bf16"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"), **NO_DROPOUT)


KINDS = ("FULL", "SHARDED")
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def command(folder: Path, backbone: Path, *options: object, module: str = "sparsepeft_cli") -> list[str]:
    """What starts two processes, as a user does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--task", "topics", "--model", backbone, "--output-dir", folder, *options]
    return [*launcher, "-m", module, "train", *map(str, arguments)]


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
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    weights = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-2, rtol=0, msg=name)  # of bfloat16
    assert [each.error for each in Predictor(tmp_path / "two").predict(["the match"])] == [None]
    again = start(tmp_path / "two", backbone, *options)
    assert again.returncode != 0
    assert "already holds a finished run" in again.stderr


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [value for line in lines for key, value in line.items() if key in ("loss", "eval_loss")]


def test_processes_with_parts_of_each_weight_train_what_one_does(backbone: Path, tmp_path: Path) -> None:
    settings, rates = SETTINGS | {"save_dtype": None}, {"head_learning_rate": 3e-3, "norms_learning_rate": 1e-4}
    alone = train(run_config(backbone, tmp_path / "one", **settings, settings=rates))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if value is not None]
    options += [f"--set={key}={value}" for key, value in rates.items()]
    words = command(tmp_path / "two", backbone, *options, "--batch-size=8", module="tests.distributed.sharded_train")
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT | SHARDED, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    for name in ("score", "selection_score", "best_step", "metrics", "saved_bytes"):
        assert results[name] == alone[name], name
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    weights = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-3, rtol=0, msg=name)
    assert [each.error for each in Predictor(tmp_path / "two").predict(["the match"])] == [None]


def test_what_processes_with_parts_of_each_weight_cannot_do(backbone: Path, tmp_path: Path) -> None:
    whole, parts = (SimpleNamespace(state_dict_type=SimpleNamespace(name=f"{kind}_STATE_DICT")) for kind in KINDS)
    config = run_config(backbone, tmp_path)
    _check_sharded(config, whole)
    with pytest.raises(UserError, match=r"in parts \(SHARDED_STATE_DICT\).*FULL_STATE_DICT"):
        _check_sharded(config, parts)
    with pytest.raises(UserError, match="`save_dtype=bfloat16` was given to processes with parts of each weight"):
        _check_sharded(replace(config, save_dtype="bf16"), whole)


def test_a_scheduler_that_starts_many_alone_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(key, raising=False)
    assert (launch.num_processes(), launch.is_first(), launch.is_sharded()) == (1, True, False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (launch.num_processes(), launch.is_first(), launch.is_sharded()) == (1, True, False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (launch.num_processes(), launch.is_first(), launch.is_sharded()) == (8, False, True)


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
