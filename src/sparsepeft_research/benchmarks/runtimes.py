"""Which library computes a bare encoder fastest on this machine's CPU, and how far its answer is from PyTorch's.

    sparsepeft benchmark runtimes --output runtimes.json

RoBERTa-base with random weights in PyTorch (as is, its products by oneDNN, in bfloat16, quantized by torchao), and
exported in ONNX Runtime and OpenVINO; int8 everywhere with activations quantized as they come. torchao and OpenVINO are
left out, and named, where they are not installed. All take turns in one process with equal threads. ``deviation`` is
the largest error of the logits over their largest entry, against PyTorch in float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sparsepeft.export.openvino_files import has_bfloat16
from sparsepeft.models.onednn import use_onednn
from sparsepeft_research.benchmarks.inference.exported import export_system
from sparsepeft_research.benchmarks.inference.processes.exported import Run, open_onnxruntime, open_openvino
from sparsepeft_research.benchmarks.inference.systems import load_model
from sparsepeft_research.benchmarks.inference.workloads import prepare_model
from sparsepeft_research.benchmarks.measuring import as_dicts, time_alternating
from sparsepeft_research.benchmarks.registry import Progress
from sparsepeft_research.benchmarks.settings import BACKBONE, ONNX, shape

LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino")
EXPORTED = ("float32", "int8")

Inputs = dict[str, np.ndarray]


def run(*, model: str, shapes: str, repeats: int, idle_wait: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Measure all shapes."""
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        backbone = prepare_model(model, folder / "model", seed)
        progress("exporting")
        candidates = _pytorch(backbone.folder, "torchao" in installed, seed)
        files = {precision: _export(backbone.folder, folder, precision, seed) for precision in EXPORTED}
        threads = torch.get_num_threads()
        for name, file in files.items():
            candidates[f"onnxruntime {name}"] = _alone(open_onnxruntime(file, None, threads, name, {}))
        openvino = (("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("int8", "float32", "int8"))
        for name, precision, file in openvino if "openvino" in installed else ():
            if precision == "bfloat16" and not has_bfloat16():
                continue
            candidates[f"openvino {name}"] = _alone(open_openvino(files[file], None, threads, precision, {}))
        names = [one.name for one in onnx.load(files["float32"]).graph.input]
        for name in shapes.split(","):
            progress(name)
            inputs = _inputs(name, names, backbone.architecture["vocab_size"], seed)
            results.append(_measure(name, inputs, candidates, repeats, idle_wait))
    return {
        "results": results,
        "settings": {"model": backbone.name},
        "versions": {name: importlib.metadata.version(name) for name in installed},
        "left_out": [name for name in LIBRARIES if name not in installed],
    }


def _measure(
    shape: str, inputs: Inputs, candidates: dict[str, Callable[[Inputs], np.ndarray]], repeats: int, idle_wait: float
) -> dict[str, Any]:
    passes = {name: lambda run=run: run(inputs) for name, run in candidates.items()}
    expected = passes["torch float32"]()
    deviations = {
        name: float(np.abs(answer() - expected).max() / np.abs(expected).max()) for name, answer in passes.items()
    }
    timings = time_alternating(passes, repeats=repeats, idle_wait_s=idle_wait)
    base = timings["torch float32"].median_ms
    return {
        "shape": shape,
        "timings": as_dicts(timings),
        "speedup_over_torch_float32": {name: base / timing.median_ms for name, timing in timings.items()},
        "deviation": deviations,
    }


def _inputs(name: str, names: list[str], vocab_size: int, seed: int) -> Inputs:
    size = shape(name)
    generator = np.random.default_rng(seed)
    values = {
        "input_ids": generator.integers(10, vocab_size // 2, size),
        "attention_mask": np.ones(size, dtype=np.int64),
    }
    return {name: values.get(name, np.zeros(size, dtype=np.int64)) for name in names}


def _alone(run: Run) -> Callable[[Inputs], np.ndarray]:
    """A runtime's answer to one batch."""
    return lambda inputs: run([inputs])[0]


def _export(model: str, folder: Path, precision: str, seed: int) -> str:
    torch.manual_seed(seed)  # of a head that the model does not have
    return export_system(BACKBONE, model, folder / precision, f"{ONNX}{precision}")["graph"] or ""


def _pytorch(model: str, with_torchao: bool, seed: int) -> dict[str, Callable[[Inputs], np.ndarray]]:
    def load(dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(seed)
        return load_model(model, dtype)

    loaded = {
        "torch float32": load(torch.float32),
        "torch float32, oneDNN": load(torch.float32),
        "torch bfloat16": load(torch.bfloat16),
    }
    use_onednn(loaded["torch float32, oneDNN"])
    if with_torchao:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        loaded["torchao int8"] = load(torch.float32)
        quantize_(loaded["torchao int8"], Int8DynamicActivationInt8WeightConfig())

    def passes(module: torch.nn.Module) -> Callable[[Inputs], np.ndarray]:
        def run(inputs: Inputs) -> np.ndarray:
            with torch.inference_mode():
                logits: torch.Tensor = module(
                    **{name: torch.from_numpy(value) for name, value in inputs.items()}
                ).logits
            return logits.float().numpy()

        return run

    return {name: passes(module) for name, module in loaded.items()}
