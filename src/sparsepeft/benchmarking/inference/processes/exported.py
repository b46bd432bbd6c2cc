"""An exported graph in ONNX Runtime, as a device runs it: ``python exported.py SETTINGS.json``. Without torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from serving import load_batches, serve


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open the graph, and the task's tensors if it has any; ready to run the plans."""
    about: dict[str, Any] = {"threads": settings["threads"], "onnxruntime": ort.__version__}
    if settings["device"] is not None:
        import dataclasses

        from sparsepeft.benchmarking.devices import emulate  # which loads torch, so that the peak memory is larger

        about["emulation"] = dataclasses.asdict(emulate(settings["device"]))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = settings["threads"], 4
    session = ort.InferenceSession(settings["graph"], options, ["CPUExecutionProvider"])
    adapter = None
    if settings["adapter"] is not None:
        adapter = ort.LoraAdapter()
        adapter.Load(settings["adapter"])
    plans = settings["plans"]
    return {plan["name"]: partial(run, session, adapter, load_batches(plan["tensors"], "np")) for plan in plans}, about


def run(session: Any, adapter: Any, batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Logits of every batch."""
    options = ort.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter)
    names = [given.name for given in session.get_inputs()]
    return [session.run(None, {name: batch[name] for name in names}, options)[0] for batch in batches]


if __name__ == "__main__":
    serve(prepare)
