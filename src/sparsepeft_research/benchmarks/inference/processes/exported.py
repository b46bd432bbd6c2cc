"""An exported model in its own runtime, as a device runs it, without torch.

python -m sparsepeft_research.benchmarks.inference.processes.exported SETTINGS.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from sparsepeft_research.benchmarks.devices import emulate
from sparsepeft_research.benchmarks.inference.processes.serving import load_batches, serve

Run = Callable[[list[dict[str, np.ndarray]]], list[np.ndarray]]


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open the model, and the task's tensors if it has any; ready to run the plans."""
    about: dict[str, Any] = {"threads": settings["threads"]}
    if settings["device"] is not None:
        about["emulation"] = dataclasses.asdict(emulate(settings["device"]))
    runtime, _, precision = settings["precision"].partition("-")
    opened = {"onnx": open_onnxruntime, "openvino": open_openvino}[runtime]
    run = opened(settings["graph"], settings["adapter"], settings["threads"], precision, about)
    return {plan["name"]: partial(run, load_batches(plan["tensors"], "np")) for plan in settings["plans"]}, about


def open_onnxruntime(graph: str, adapter: str | None, threads: int, precision: str, about: dict[str, Any]) -> Run:
    """The graph in ONNX Runtime, whose precision is the file's."""
    import onnxruntime as ort

    about["onnxruntime"] = ort.__version__
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
    names = [input_.name for input_ in session.get_inputs()]
    loaded = ort.LoraAdapter()
    if adapter is not None:
        loaded.Load(adapter)

    def run(batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        active = ort.RunOptions()  # it does not keep the adapter alive
        if adapter is not None:
            active.add_active_adapter(loaded)
        return [session.run(None, {name: batch[name] for name in names}, active)[0] for batch in batches]

    return run


def open_openvino(graph: str, adapter: str | None, threads: int, precision: str, about: dict[str, Any]) -> Run:
    """The model in OpenVINO, which computes in ``precision``."""
    import openvino as ov
    from safetensors.numpy import load_file

    about["openvino"] = ov.__version__
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    compiled = ov.compile_model(graph, "CPU", options)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != hint:
        raise RuntimeError(f"OpenVINO computes in {used} on this processor")
    request = compiled.create_infer_request()
    names = {input_.any_name for input_ in compiled.inputs}
    tensors = {} if adapter is None else load_file(adapter)
    for name, tensor in tensors.items():
        request.set_tensor(name.removeprefix("base_model.model."), ov.Tensor(tensor))

    def run(batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [request.infer({name: batch[name] for name in names & batch.keys()})[0] for batch in batches]

    return run


if __name__ == "__main__":
    serve(prepare)
