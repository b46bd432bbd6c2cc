"""``sparsepeft benchmark``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused, sparsepeft

from sparsepeft_research.benchmarks.inference.report import device_throughput
from sparsepeft_research.benchmarks.registry import BENCHMARKS
from sparsepeft_research.results import read_result

pytestmark = pytest.mark.slow


def test_inference_on_an_emulated_device(tiny_backbone: Path, tmp_path: Path) -> None:
    output = tmp_path / "pi.json"
    command = ["benchmark", "inference", "--model", tiny_backbone, "--systems", "backbone,spartan,adapters-pfeiffer"]
    command += ["--precisions", "fp32", "--shapes", "32x8,1x8", "--repeats", "2", "--threads", "1"]
    done = ran(*command, "--emulate", "raspberry-pi-4", "--output", output)
    for words in (
        "spartan fp32",
        "peak MiB",
        "architecture (fp32)",
        "ARM Cortex-A72",
        "adapters-pfeiffer was left out",
    ):
        assert words in done.stdout
    report = json.loads(output.read_text())
    throughput, latency = report["results"]
    assert (throughput["plan"], latency["plan"]) == ("32 x 8", "1 x 8")
    assert latency["candidates"]["spartan float32"]["timing"]["repeats"] == 20
    for found in throughput["candidates"].values():
        assert found["peak_bytes"] > 2**20
        assert 0 < found["share_of_peak"] < 1
    assert {ready["threads"] for ready in report["processes"].values()} == {1}
    assert report["processes"]["spartan float32"]["emulation"]["device"] == "raspberry-pi-4"
    device, sizes, rates = device_throughput(report)
    assert (device, sizes["hidden_size"], set(rates)) == ("raspberry-pi-4", 32, {"full", "spartan"})


def test_spt(tiny_language_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "spt.json"
    command = ["benchmark", "spt", "--model", tiny_language_model, "--layers", "1", "--lengths", "32", "--repeats", "2"]
    command += ["--num-blocks", "4", "--active-blocks", "2", "--threads", "1", "--output", output]
    done = ran(*command)
    printed = " ".join(done.stdout.split())  # a long path breaks the title over lines
    for words in ("1 x 32 tokens", "sdpa, checkpointing", "both 2/4", "peak MiB", "FFN"):
        assert words in printed
    report = json.loads(output.read_text())
    assert report["environment"]["versions"]["torch"]
    assert report["settings"]["active_blocks"] == [2]
    assert "both 2/4 exact" in report["results"][0]["candidates"]


def test_every_benchmark_is_listed_and_says_what_it_measures() -> None:
    listed = " ".join(sparsepeft("benchmark", "--help").stdout.split())
    for name, benchmark in BENCHMARKS.items():
        assert name in listed
        shown = sparsepeft("benchmark", name, "--help").stdout
        for parameter in benchmark.parameters:
            assert parameter.option in shown
            assert parameter.help.split()[0] in shown


@pytest.mark.parametrize("name", ["memory", "sparse_attention", "routed_ffn"])
def test_an_op_is_verified_and_timed(name: str, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = ran("benchmark", name, "--quick", "--repeats", 2, "--threads", 1, "--output", output, "--json")
    assert json.loads(done.stdout) == json.loads(output.read_text())
    result = read_result(output)
    assert (result.measured, result.seed, result.settings["repeats"]) == (name, 0, 2)
    assert all(one["largest_relative_error"] for one in result.results)
    assert "load_average" in result.environment


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sparsepeft_research.benchmarks.runtimes", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused("benchmark", "runtimes", words='pip install "sparsepeft[export-onnx]"')
