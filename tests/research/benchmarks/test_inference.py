"""The inference benchmark: its plans, its systems, what it compares, and what it says of given timings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import RobertaConfig

from sparsepeft.errors import UserError
from sparsepeft.export.openvino_files import has_bfloat16
from sparsepeft_research.benchmarks.inference import workloads
from sparsepeft_research.benchmarks.inference.exported import export_system
from sparsepeft_research.benchmarks.inference.groups import Grouping
from sparsepeft_research.benchmarks.inference.processes.pytorch import measure_loading
from sparsepeft_research.benchmarks.inference.processes.serving import load_batches
from sparsepeft_research.benchmarks.inference.report import Measured, describe, device_throughput, factors, write_figure
from sparsepeft_research.benchmarks.inference.systems import prepare_system, save_task
from sparsepeft_research.benchmarks.inference.workloads import Model, Plan, Planner, count_flops, prepare_model
from sparsepeft_research.benchmarks.measuring import Timing
from sparsepeft_research.benchmarks.registry import run_benchmark
from sparsepeft_research.benchmarks.settings import InferenceBenchmark


@pytest.fixture(scope="module")
def model(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return prepare_model(str(tiny_backbone), tmp_path_factory.mktemp("unused"), 0)


@pytest.fixture(scope="module")
def planner(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return Planner(model, tmp_path_factory.mktemp("plans"), 0)


@pytest.fixture(scope="module")
def task_folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(model.folder, tmp_path_factory.mktemp("task"), [1])


def settings(model: Model, plans: list[Plan], **changes: Any) -> dict[str, Any]:
    given = [asdict(plan) | {"system": changes.get("system")} for plan in plans]
    values = {"plans": given, "model": model.folder, "precision": "float32", "seed": 0}
    return json.loads(json.dumps(values | {"num_tasks": 3, "token_budget": 64, "max_length": 64} | changes))


def timing(median_ms: float) -> Timing:
    return Timing(median_ms, 0.9 * median_ms, 1.1 * median_ms, median_ms, 3, 1)


def measured(group: str, plan: str, milliseconds: dict[str, float], **more: Any) -> Measured:
    return Measured(group, plan, 32, {name: timing(value) for name, value in milliseconds.items()}, **more)


# -- plans ---------------------------------------------------------------------------------


def test_a_shape_has_texts_of_exactly_its_length(planner: Planner) -> None:
    plan = planner.of_shape(5, 17)
    (batch,) = load_batches(plan.tensors)
    assert batch["input_ids"].shape == (5, 17)
    assert batch["attention_mask"].all()
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 5
    assert not plan.is_latency
    assert planner.of_shape(1, 8).is_latency
    for length in (2, 65):
        with pytest.raises(UserError, match="3 to 64"):
            planner.of_shape(1, length)


def test_a_task_in_both_kinds_of_batches_has_the_same_inputs(planner: Planner) -> None:
    padded, by_tokens = (planner.of_task("topics", None, 50, batching) for batching in ("padded", "by tokens"))
    assert padded.texts == by_tokens.texts
    assert [len(rows) for rows in padded.batches] == [32, 18]
    assert all(batch["input_ids"].shape[1] == 64 for batch in load_batches(padded.tensors))  # the model takes no 128
    rows = {}
    for plan in (padded, by_tokens):
        for order, batch in zip(plan.batches, load_batches(plan.tensors), strict=True):
            pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ids = [tuple(row[mask.bool()].tolist()) for row, mask in pairs]
            rows[plan.name] = rows.get(plan.name, {}) | dict(zip(order, ids, strict=True))
    assert rows[padded.name] == rows[by_tokens.name]
    assert len(rows[padded.name]) == 50
    sizes = [batch["input_ids"].numel() for batch in load_batches(by_tokens.tensors)]
    assert sum(sizes) < 50 * 64
    assert len(planner.of_task("topics", None, None, "padded").texts) > 50


@pytest.fixture
def random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    small = RobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setattr(workloads, "load_config", lambda name: small)
    return prepare_model("roberta-base", tmp_path / "model", 0)


def test_the_random_backbone_is_a_folder_like_any_other(random: Model, tmp_path: Path) -> None:
    assert random.name == "roberta-base, random weights"
    assert random.tokenizer.startswith("all-MiniLM-L6-v2")  # lengths are another model's, and that is said
    assert random.architecture["hidden_size"] == 32
    planner = Planner(random, tmp_path, 0)
    plan = planner.of_shape(3, 128)
    (batch,) = load_batches(plan.tensors)
    assert set(batch) == {"input_ids", "attention_mask"}  # RoBERTa has no second type of token
    (logits,) = prepare_system(settings(random, [plan], system="backbone"))[plan.name]()  # type: ignore[misc]
    assert logits.shape == (3, 2)
    engine = settings(random, [plan], system="engine", task_folder=str(save_task(random.folder, tmp_path / "task")))
    prepare_system(engine | {"max_length": 128, "num_tasks": 1})[plan.name]()


def test_flops_are_those_of_the_layers_products(model: Model) -> None:
    size, length, width, inner, layers, labels = 4, 16, 32, 64, 2, 2
    tokens = size * length
    per_layer = 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * length * width
    head = 2 * size * width * (width + labels)
    assert count_flops(model.folder, size, length) == layers * per_layer + head


# -- systems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["full", "spartan", "pfeiffer", "houlsby", "lora"])
def test_a_mixed_batch_answers_every_row(system: str, model: Model, planner: Planner) -> None:
    plans = [planner.of_shape(7, 9), planner.of_shape(7, 9, "mixed")]
    passes = prepare_system(settings(model, plans, system=system))
    single, mixed = (torch.cat(list(passes[plan.name]())) for plan in plans)  # type: ignore[call-overload]
    assert single.shape == mixed.shape == (7, 2)
    assert torch.allclose(single[:3], mixed[:3], atol=1e-5)  # rows of the first task
    assert torch.allclose(single[3:], mixed[3:], atol=1e-5) == (system == "full")  # whose copies are equal


def test_precisions_answer_nearly_the_same(model: Model, planner: Planner) -> None:
    plan = planner.of_shape(4, 16)
    logits = {}
    for precision in ("float32", "bfloat16", "int8"):
        passes = prepare_system(settings(model, [plan], system="backbone", precision=precision))
        (logits[precision],) = passes[plan.name]()  # type: ignore[misc]
    assert logits["bfloat16"].dtype == torch.bfloat16
    for precision in ("bfloat16", "int8"):
        assert not torch.equal(logits[precision].float(), logits["float32"])
        torch.testing.assert_close(logits[precision].float(), logits["float32"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("runtime", "system"), [("onnxruntime", "backbone"), ("onnxruntime", "spartan"), ("openvino", "spartan")]
)
def test_runtimes_answer_what_pytorch_does(system: str, runtime: str, random: Model, tmp_path: Path) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    tolerances = {"onnx-float32": 1e-5, "onnx-int8": 0.1}
    if runtime == "openvino":
        tolerances = {"openvino-float32": 1e-5} | ({"openvino-bfloat16": 0.05} if has_bfloat16() else {})
    plan = Planner(random, tmp_path, 0).of_shape(4, 16)
    passes = prepare_system(settings(random, [plan], system=system, num_tasks=1))
    (expected,) = passes[plan.name]()  # type: ignore[misc]
    paths = []
    for precision in tolerances:
        torch.manual_seed(0)  # the settings' seed: the same values
        files = export_system(system, random.folder, tmp_path / precision, precision)
        paths.append(tmp_path / f"{precision}.json")
        paths[-1].write_text(json.dumps(settings(random, [plan], threads=1, device=None, precision=precision) | files))
    program = (
        "import json, sys\nfrom sparsepeft_research.benchmarks.inference.processes import exported\n"
        "for path in sys.argv[1:]:\n"
        "    passes, about = exported.prepare(json.load(open(path)))\n"
        "    (logits,) = next(iter(passes.values()))()\n"
        "    print(json.dumps(logits.tolist()))\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True, timeout=120
    )
    *answers, has_torch = ran.stdout.splitlines()
    assert has_torch == "False"  # its peak memory is that of a device without it
    for answer, tolerance in zip(answers, tolerances.values(), strict=True):
        torch.testing.assert_close(torch.tensor(json.loads(answer)), expected, atol=tolerance, rtol=tolerance)


def test_without_the_fused_read_the_memory_computes_the_same(model: Model, planner: Planner) -> None:
    plan = planner.of_shape(4, 16)
    both = [
        prepare_system(settings(model, [plan], system=system))[plan.name]() for system in ("spartan", "spartan-unfused")
    ]
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=1e-5)


def test_systems_that_share_a_process_share_the_weights(model: Model, planner: Planner) -> None:
    plan = asdict(planner.of_shape(4, 16))
    shared = ("backbone", "spartan", "spartan-unfused", "lora")
    plans = [plan | {"name": f"{name} 4 x 16", "system": name} for name in shared]
    passes = prepare_system(settings(model, [], system="backbone") | {"plans": plans})
    logits = {name: torch.cat(list(passes[f"{name} 4 x 16"]())) for name in shared}  # type: ignore[call-overload]
    alone = prepare_system(settings(model, [planner.of_shape(4, 16)], system="backbone"))["4 x 16"]()
    assert torch.equal(logits["backbone"], torch.cat(list(alone)))  # type: ignore[call-overload]
    for name in shared[1:]:
        assert not torch.allclose(logits[name], logits["backbone"], atol=1e-4)
    runners = [passes[f"{name} 4 x 16"].args[0] for name in shared]  # type: ignore[attr-defined]
    (one, *others) = ({parameter.data_ptr() for parameter in runner.parameters()} for runner in runners)
    assert all(one <= other for other in others)


def test_an_engine_runs_every_mode_and_loads_tasks(model: Model, planner: Planner, task_folder: Path) -> None:
    plans = [planner.of_shape(7, 9, mode) for mode in ("single", "mixed", "all", "separate")]
    given = settings(model, plans, system="engine", task_folder=str(task_folder))
    passes = prepare_system(given)
    assert list(passes) == ["7 x 9", "7 x 9, mixed", "7 x 9, all", "7 x 9, separate"]
    for run in passes.values():
        run()  # raises where a row is not answered
    found = measure_loading(given | {"num_loaded": 3, "text": plans[0].texts[0][0]})
    assert found["file_bytes"] == 3 * (task_folder / "adapter_model.safetensors").stat().st_size
    assert found["resident_over_files"] == found["resident_bytes"] / found["file_bytes"]
    assert 0 < found["swap_ms"] < found["replace_ms"]
    layers = json.loads((task_folder / "adapter_config.json").read_text())["layers_to_transform"]
    assert layers == [1]
    assert not any(".layer.0." in name for name in load_file(task_folder / "adapter_model.safetensors"))


# -- groups ---------------------------------------------------------------------------------


def test_what_is_timed_against_what(planner: Planner) -> None:
    grouping = Grouping(InferenceBenchmark(shapes=((4, 8), (1, 8)), mixed=True), planner)
    groups = {group.name: group for group in grouping.groups()}
    exported_in = ["onnx-float32", "onnx-int8", "openvino-float32", "openvino-bfloat16"]
    assert list(groups) == ["float32", "bfloat16", "int8", *exported_in, "precisions", "mixed"]
    own = ["backbone", "spartan", "pfeiffer", "houlsby", "lora", "spartan-unfused", "engine"]
    assert [candidate.system for candidate in groups["float32"].candidates] == own
    assert [candidate.name for candidate in groups["int8"].candidates] == ["backbone int8"]
    for name in exported_in:
        systems = [candidate.system for candidate in groups[name].candidates]
        assert systems == ["backbone", "spartan", "pfeiffer", "houlsby"]
        assert "not exported" in grouping.left_out[f"lora {name}"]
    mixed = {candidate.system: [plan.mode for plan in candidate.plans] for candidate in groups["mixed"].candidates}
    assert mixed["full"] == mixed["engine"] == ["single", "mixed"]
    assert mixed["engine-upper"] == ["all", "separate"]
    assert {candidate.num_tasks for candidate in groups["mixed"].candidates} == {9}
    assert "peers_python" in grouping.left_out["adapters-pfeiffer"]
    assert "linear layers" in grouping.left_out["spartan int8"]
    assert "full" not in grouping.left_out
    single = Grouping(InferenceBenchmark(shapes=((4, 8),), systems=("full",)), planner)
    assert single.groups() == []
    assert "mixed batches" in single.left_out["full"]


def test_the_backbone_and_its_adapted_forms_share_a_process_if_asked(planner: Planner) -> None:
    benchmark = InferenceBenchmark(shapes=((4, 8),), systems=("backbone", "spartan", "engine"), one_process=True)
    groups = {group.name: group for group in Grouping(benchmark, planner).groups()}
    assert [one.process for one in groups["float32"].candidates] == ["shared float32"] * 2 + ["engine float32"]
    assert [one.process for one in groups["int8"].candidates] == ["backbone int8"]
    precisions = {one.process for one in groups["precisions"].candidates}
    assert {"shared float32", "shared bfloat16", "backbone int8"} <= precisions


@pytest.mark.slow
def test_processes_are_started_as_often_as_asked(tiny_backbone: Path) -> None:
    result = run_benchmark(
        "inference",
        model=str(tiny_backbone),
        systems=("backbone", "spartan"),
        precisions=("float32",),
        shapes=((1, 8),),
        repeats=2,
        starts=2,
        one_process=True,
        threads=1,
    )
    assert (result.measured, result.seed, result.settings["one_process"]) == ("inference", 0, True)
    (plan,) = result.results
    assert [one["timing"]["repeats"] for one in plan["candidates"].values()] == [40, 40]
    assert [one["peak_bytes"] for one in plan["candidates"].values()] == [None, None]  # not told apart


def test_peers_are_timed_where_their_python_is(planner: Planner, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.touch()
    values = {"systems": ("spartan", "engine", "adapters-houlsby"), "precisions": ("float32",), "peers_python": python}
    tasks = InferenceBenchmark(workload="tasks", tasks=("topics",), max_inputs=4, **values)  # type: ignore[arg-type]
    (group,) = Grouping(tasks, planner).groups()
    assert [candidate.name for candidate in group.candidates] == [
        "spartan float32",
        "engine float32",
        "adapters-houlsby float32",
    ]
    assert [len(candidate.plans) for candidate in group.candidates] == [2, 1, 2]  # an engine makes its own batches
    by_default = InferenceBenchmark(workload="tasks").chosen_systems
    assert by_default == ("backbone", "spartan", "engine", "adapters-pfeiffer", "adapters-houlsby")
    emulated = Grouping(InferenceBenchmark(emulate="iphone-11", shapes=((4, 8),), **values), planner)  # type: ignore[arg-type]
    emulated.groups()
    assert "emulated device" in emulated.left_out["adapters-houlsby"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"systems": ("sparta",)}, "did you mean 'spartan'"),
        ({"systems": ()}, "No `systems`"),
        ({"precisions": ("float16",)}, "float16"),
        ({"workload": "real"}, "real"),
        ({"emulate": "raspberry-pi-3"}, "raspberry-pi-4"),
        ({"shapes": ((0, 8),)}, "at least 1"),
        ({"repeats": 1}, "repeats=1"),
        ({"starts": 0}, "starts=0"),
        ({"max_inputs": -1}, "max_inputs=-1"),
        ({"mixed": True, "workload": "tasks"}, "fixed"),
        ({"mixed": True, "precisions": ("onnx-float32",)}, "float32 or bfloat16"),
        ({"peers_python": Path("nowhere/python")}, "nowhere"),
    ],
)
def test_bad_values(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        InferenceBenchmark(**changes)


# -- what is made of timings ---------------------------------------------------------------------------------


def test_factors_of_a_task_are_measured_one_by_one() -> None:
    padded = {"spartan float32": 800.0, "spartan bfloat16": 200.0, "adapters-pfeiffer float32": 880.0}
    padded |= {"spartan onnx-float32": 640.0, "spartan onnx-int8": 160.0}
    by_tokens = {"spartan float32": 400.0, "engine float32": 500.0, "engine bfloat16": 110.0, "spartan onnx-int8": 80.0}
    padded |= {"spartan openvino-float32": 500.0, "spartan openvino-bfloat16": 125.0}
    by_tokens |= {"adapters-pfeiffer bfloat16": 132.0, "adapters-houlsby bfloat16": 121.0}
    by_tokens |= {"spartan openvino-bfloat16": 55.0}
    found = factors([measured("sst2", "sst2, padded", padded), measured("sst2", "sst2, by tokens", by_tokens)])
    values = {(one["factor"], one["of"][0] if "of" in one else ""): one["value"] for one in found}
    assert values == pytest.approx(
        {
            ("architecture", "spartan float32"): 1.1,
            ("length batching", "spartan float32"): 2.0,
            ("precision", "spartan bfloat16"): 4.0,
            ("engine", "engine float32"): 0.8,
            ("product for engine bfloat16", ""): 1.1 * 2.0 * 4.0 * 0.8,
            ("total", "engine bfloat16"): 8.0,
            ("over the best peer, same precision and batches", "engine bfloat16"): 1.1,
            ("runtime", "spartan onnx-float32"): 1.25,
            ("precision", "spartan onnx-int8"): 4.0,
            ("product for spartan onnx-int8", ""): 1.1 * 2.0 * 1.25 * 4.0,
            ("total", "spartan onnx-int8"): 11.0,
            ("runtime", "spartan openvino-float32"): 1.6,
            ("precision", "spartan openvino-bfloat16"): 4.0,
            ("product for spartan openvino-bfloat16", ""): 1.1 * 2.0 * 1.6 * 4.0,
            ("total", "spartan openvino-bfloat16"): 16.0,
            ("over the best peer, same precision and batches", "spartan openvino-bfloat16"): 2.2,
        }
    )
    assert found[0]["over"] == ["adapters-pfeiffer float32", "sst2, padded"]
    without_peers = [
        measured("sst2", "sst2, padded", {"spartan float32": 800.0}),
        measured("sst2", "sst2, by tokens", {"spartan float32": 400.0}),
    ]
    assert [one["factor"] for one in factors(without_peers)] == ["length batching"]


def test_factors_of_shapes_stay_within_their_group() -> None:
    found = factors(
        [
            measured("float32", "4 x 8", {"backbone float32": 98.0, "spartan float32": 100.0, "lora float32": 120.0}),
            measured("bfloat16", "4 x 8", {"backbone bfloat16": 30.0}),
            measured("precisions", "4 x 8", {"backbone float32": 90.0, "backbone bfloat16": 30.0}),
            measured("mixed", "4 x 8", {"engine float32": 95.0}),
            measured("mixed", "4 x 8, mixed", {"engine float32": 100.0}),
            measured("mixed", "4 x 8, all", {"engine-upper float32": 300.0}),
            measured("mixed", "4 x 8, separate", {"engine-upper float32": 900.0}),
        ]
    )
    assert {(one["factor"], one["group"]): one["value"] for one in found} == pytest.approx(
        {
            ("architecture", "float32"): 0.98,
            ("precision", "precisions"): 3.0,
            ("mixed batches", "mixed"): 0.95,
            ("shared lower layers", "mixed"): 3.0,
        }
    )


def test_the_share_of_the_best_matrix_product(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    products = {"small": timing(1.0), "large": timing(4.0)}
    flops = {"small": 10_000, "large": 50_000}
    one = measured(
        "float32", "4 x 8", {"backbone float32": 100.0}, products=products, product_flops=flops, flops=1_000_000
    )
    one.peak_bytes = {"backbone float32": 7}
    report = describe([one])
    (result,) = report["results"]
    assert result["peak_flops_per_s"] == pytest.approx(12.5e6)  # the large one's
    found = result["candidates"]["backbone float32"]
    assert found["share_of_peak"] == pytest.approx(10e6 / 12.5e6)
    assert found["inputs_per_minute"] == pytest.approx(32 * 600)
    assert found["peak_bytes"] == 7
    drawn = report | {"settings": {"precisions": ["float32"], "model": "a model", "threads": 1}}
    files = write_figure(drawn, tmp_path / "figure")
    assert [file.name for file in files] == ["figure.png", "figure.svg"]
    assert "backbone float32" in files[1].read_text()


def test_throughput_of_a_device_needs_batches_of_32_in_float32() -> None:
    one = measured("float32", "32 x 128", {"backbone float32": 1000.0, "spartan float32": 1250.0})
    content = describe([one]) | {"settings": {"device": "iphone-11", "architecture": {"hidden_size": 768}}}
    assert device_throughput(content) == ("iphone-11", {"hidden_size": 768}, {"full": 1920.0, "spartan": 1536.0})
    here = content | {"settings": {"device": None, "architecture": {}}}
    with pytest.raises(ValueError, match="emulated device"):
        device_throughput(here)
    for wrong in ({}, [], content | {"results": []}):
        with pytest.raises(ValueError, match="batches of 32"):
            device_throughput(wrong)
