"""The Flower app in ``examples/federated``: what travels, what is learned, what is left."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.cli.test_cli import ran

from sparsepeft.backbones import BackboneError, default_backbone
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.methods.models import load_backbone
from sparsepeft.tasks import task_spec

pytest.importorskip("flwr", reason='Flower is not installed; run pip install "sparsepeft[federated]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
APP = Path(__file__).parents[2] / "examples" / "federated"
CHANCE = 0.2  # five topics, as many texts of each
# Steps of a length and at a rate that show something within seconds.
FAST: dict[str, Any] = {"max_length": 32, "batch_size": 8, "lr": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def app() -> Iterator[None]:
    try:
        default_backbone()
    except BackboneError as error:
        pytest.skip(str(error))
    sys.path.insert(0, str(APP))
    yield
    sys.path.remove(str(APP))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"federated_memories.{name}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A federation of two clients with other topics each, and its folder."""
    folder = tmp_path_factory.mktemp("federation") / "out"
    run = module("in_process").run_in_process
    return run(2, partition="topic", num_rounds=2, output_dir=str(folder), **FAST), folder


def test_clients_send_memories_and_head_alone(finished: tuple[dict[str, Any], Path]) -> None:
    history, folder = finished
    tensors = load_file(folder / "adapter_model.safetensors")
    # A memory of 16 parents with 3 children in each of six layers of 384 channels; a head of five labels.
    expected = 6 * 16 * (1 + 2 * 3) * 384 + 5 * (384 + 1)
    assert sum(tensor.numel() for tensor in tensors.values()) == history["parameters"]["trained"] == expected
    assert history["tensors"] == len(tensors) == 6 * 3 + 2
    assert all("spartan_memory" in name or "classifier" in name for name in tensors)
    for metrics in history["train"].values():
        for direction in ("bytes-down", "bytes-up"):
            assert 4 * expected < metrics[direction] < 1.02 * 4 * expected


def test_the_average_learns(finished: tuple[dict[str, Any], Path]) -> None:
    history, _ = finished
    assert sorted(history["test"]) == ["0", "1", "2"]
    assert history["test"]["2"]["accuracy"] > 2 * CHANCE
    assert set(history["evaluate"]) == {"1", "2"}  # on the clients' own held-out texts
    task = module("task").load(
        module("in_process").default_values() | {k.replace("_", "-"): v for k, v in FAST.items()}
    )
    assert history["train"]["1"]["steps"] <= -(-len(task.data.train) // FAST["batch_size"])


def test_the_averaged_adapter_is_used_without_flower(finished: tuple[dict[str, Any], Path]) -> None:
    _, folder = finished
    model = PeftModel.from_pretrained(load_backbone(str(default_backbone()), task_spec("topics")), folder).eval()
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[101, 2374, 102]])).logits.shape == (1, 5)
    answer = ran("predict", folder, "The striker scored twice.").stdout
    assert any(label in answer for label in task_spec("topics").label_names or ())
    evaluated = json.loads(ran("evaluate", folder, "--json").stdout)
    history = json.loads((folder / "federation.json").read_text())
    assert evaluated["test"]["accuracy"] == pytest.approx(history["test"]["2"]["accuracy"], abs=0.01)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_and_strategies(method: str, tmp_path: Path) -> None:
    changes = {"lora": {"proximal_mu": 0.5}, "full": {"server_momentum": 0.5, "lr": 1e-4}}[method]
    values = FAST | changes | {"method": method, "max_train_samples": 20, "fraction_evaluate": 0.0}
    folder = tmp_path / "out"
    history = module("in_process").run_in_process(3, num_rounds=1, output_dir=str(folder), **values)
    assert history["train"]["1"]["bytes-up"] > 4 * history["parameters"]["trained"]
    assert not history["evaluate"]
    ran("predict", folder, "The striker scored twice.")


def test_parts_are_all_rows_once() -> None:
    task = module("task")
    labels = [0] * 7 + [1] * 5 + [2] * 4 + [1]
    for partition in task.PARTITIONS:
        for count in (1, 2, 3, 5, 8):
            parts = [task.part_of(labels, 3, partition, index, count, seed=1) for index in range(count)]
            assert sorted(row for part in parts for row in part) == list(range(len(labels)))
            if partition == "topic" and count >= 3:
                assert all(len({labels[row] for row in part}) == 1 for part in parts)
            elif partition == "random":
                assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_proximal_term_holds_a_client_back() -> None:
    task_module, values = module("task"), module("in_process").default_values()
    task = task_module.load(values | {name.replace("_", "-"): value for name, value in FAST.items()})
    rows, moved = task.data.train.select(range(24)), []
    for mu in (0.0, 100.0):
        task_module.receive(task.built.model, task.initial)
        task_module.train(task, rows, 1.0, seed=1, proximal_mu=mu)
        after = task_module.travelling(task.built.model)
        moved.append(sum((after[name] - before).square().sum().item() for name, before in task.initial.items()))
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partition": "size"}, "valid are random, topic"),
        ({"partitions": "topic"}, "partition"),
        ({"task": "stsb"}, "one label each"),
        ({"server_momentum": 0.5, "proximal_mu": 0.1}, "two strategies"),
        ({"output_dir": "out"}, "an absolute path"),
        ({"output_dir": str(APP)}, "other files"),
        ({"num_rounds": 0}, "num-rounds"),
    ],
)
def test_values_that_cannot_be_used(values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "task" in values and "SPARSEPEFT_DATA" not in os.environ:
        pytest.skip("real data not found: set SPARSEPEFT_DATA")
    with pytest.raises(UserError, match=words):
        module("in_process").run_in_process(2, **{"num_rounds": 1, **values})


def test_more_clients_than_texts() -> None:
    with pytest.raises(UserError, match="No rows are left for client 5 of 6"):
        module("task").part_of([0, 1, 0, 1, 0], 2, "random", 5, 6, seed=1)
    with pytest.raises(UserError, match="partition-id=6"):
        module("task").part_of([0, 1, 0, 1, 0], 2, "random", 6, 6, seed=1)


def test_flwr_run(tmp_path: Path) -> None:
    """As on the command line, in Flower's simulation, with a SuperLink of the test's own, without a network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    variables = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment, (host, port) = os.environ | variables, address.split(":")
    link = ["flower-superlink", "--insecure", "--simulation", "--host", host, "--port", port]
    values = f'num-rounds=1 max-train-samples=40 max-length=16 fraction-evaluate=0.0 output-dir="{out}"'
    with (tmp_path / "superlink.log").open("w") as log:
        superlink = subprocess.Popen(
            [*link, "--disable-runtime-dependency-installation"], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
        try:
            _wait_for(address)
            command = ["flwr", "run", str(APP), "--stream", "--federation-config", "num-supernodes=2"]
            done = subprocess.run(
                [*command, "--run-config", values], env=environment, capture_output=True, text=True, cwd=tmp_path
            )
        finally:
            superlink.send_signal(signal.SIGTERM)
            superlink.wait(60)
    said = done.stdout + done.stderr
    if "The current node timed out during startup" in said:
        pytest.skip("Ray gives its node 30 seconds to start, in which this machine did not")
    assert (out / "adapter_model.safetensors").is_file(), said[-5000:]
    assert json.loads((out / "federation.json").read_text())["test"].keys() == {"0", "1"}


def _wait_for(address: str, seconds: float = 120) -> None:
    host, port = address.split(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise RunFailed(f"No SuperLink answers on {address}.") from None
            time.sleep(0.2)
