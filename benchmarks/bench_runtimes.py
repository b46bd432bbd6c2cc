"""Which library computes a bare encoder fastest on this machine's CPU, and how far its answer is from PyTorch's.

    python benchmarks/bench_runtimes.py --output benchmarks/results/runtimes.json

RoBERTa-base with random weights in PyTorch (as is, its products by oneDNN, in bfloat16, quantized by torchao), and
exported in ONNX Runtime and OpenVINO; int8 everywhere with activations quantized as they come. torchao and OpenVINO are
left out, and named, where they are not installed. All take turns in one process with equal threads. ``deviation`` is
the largest error of the logits over their largest entry, against PyTorch in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from _common import describe_environment, time_alternating, write_json
from sparsepeft.inference.onednn import use_onednn
from sparsepeft_research.benchmarks.inference.exported import export_system
from sparsepeft_research.benchmarks.inference.systems import BACKBONE, ONNX, load_model
from sparsepeft_research.benchmarks.inference.workloads import prepare_model

LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino")
EXPORTED = ("float32", "int8")

Inputs = dict[str, np.ndarray]


def main() -> None:
    """Run all shapes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default="roberta-base", help="as in `sparsepeft benchmark inference`")
    parser.add_argument("--shapes", nargs="+", default=["32x128", "1x32"], help="batch size x tokens")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each candidate")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument("--idle-wait", type=float, default=0.0, help="seconds to wait for an idle machine")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    environment = describe_environment(seed=options.seed)
    environment["versions"] |= {name: importlib.metadata.version(name) for name in installed}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(options.model, Path(folder) / "model", options.seed)
        candidates = _pytorch(model.folder, "torchao" in installed, options.seed)
        files = {precision: _export(model.folder, Path(folder), precision, options.seed) for precision in EXPORTED}
        candidates |= {f"onnxruntime {name}": _onnxruntime(file, options.threads) for name, file in files.items()}
        if "openvino" in installed:
            candidates |= {
                f"openvino {precision}": _openvino(files[file], precision, options.threads)
                for precision, file in (("float32", "float32"), ("bfloat16", "float32"), ("int8", "int8"))
            }
        names = [one.name for one in onnx.load(str(files["float32"])).graph.input]
        for shape in options.shapes:
            inputs = _inputs(shape, names, model.architecture["vocab_size"], options.seed)
            results.append(_measure(shape, inputs, candidates, options))
    missing = [name for name in LIBRARIES if name not in installed]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}")
    about = {"model": model.name, "threads": options.threads, "left_out": missing}
    write_json(options.output, {"environment": environment, **about, "results": results})


def _measure(
    shape: str, inputs: Inputs, candidates: dict[str, Callable[[Inputs], np.ndarray]], options: argparse.Namespace
) -> dict[str, Any]:
    passes = {name: lambda run=run: run(inputs) for name, run in candidates.items()}
    expected = passes["torch float32"]()
    deviations = {
        name: float(np.abs(answer() - expected).max() / np.abs(expected).max()) for name, answer in passes.items()
    }
    timings = time_alternating(passes, repeats=options.repeats, idle_wait_s=options.idle_wait)
    base = timings["torch float32"].median_ms
    print(f"{shape}\n" + "\n".join(
        f"  {name:<22} {timing.median_ms:8.1f} ms  {base / timing.median_ms:5.2f} times  off {deviations[name]:.1e}"
        for name, timing in timings.items()
    ), flush=True)  # fmt: skip
    return {
        "shape": shape,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "speedup_over_torch_float32": {name: base / timing.median_ms for name, timing in timings.items()},
        "deviation": deviations,
    }


def _inputs(shape: str, names: list[str], vocab_size: int, seed: int) -> Inputs:
    size = tuple(int(number) for number in shape.split("x"))
    generator = np.random.default_rng(seed)
    values = {
        "input_ids": generator.integers(10, vocab_size // 2, size),
        "attention_mask": np.ones(size, dtype=np.int64),
    }
    return {name: values.get(name, np.zeros(size, dtype=np.int64)) for name in names}


def _export(model: str, folder: Path, precision: str, seed: int) -> str | None:
    torch.manual_seed(seed)  # of a head that the model does not have
    return export_system(BACKBONE, model, folder / precision, f"{ONNX}{precision}")["graph"]


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


def _onnxruntime(file: str | None, threads: int) -> Callable[[Inputs], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> np.ndarray:
        logits: np.ndarray = session.run(None, inputs)[0]
        return logits

    return run


def _openvino(file: str | None, precision: str, threads: int) -> Callable[[Inputs], np.ndarray]:
    import openvino

    # Without a hint it takes bfloat16 wherever the processor has it.
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", hint | {"PERFORMANCE_HINT": "LATENCY"})

    def run(inputs: Inputs) -> np.ndarray:
        logits: np.ndarray = compiled(inputs)[0]
        return logits

    return run


if __name__ == "__main__":
    main()
