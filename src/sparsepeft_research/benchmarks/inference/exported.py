"""Systems as ONNX Runtime and OpenVINO run them."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsepeft.export import export_tasks
from sparsepeft.export.exporting import check_format
from sparsepeft.export.files import ADAPTER, TASKS, WEIGHTS
from sparsepeft.export.graph import trace_alone
from sparsepeft.export.onnx_files import GRAPH
from sparsepeft.export.onnx_graph import ATTENTION, quantize, to_onnx
from sparsepeft.export.openvino_files import MODEL
from sparsepeft.methods.models import load_tokenizer
from sparsepeft_research.benchmarks.inference.systems import export_format, load_model, save_task
from sparsepeft_research.benchmarks.settings import BACKBONE

_FILES = {"onnx": (GRAPH, ADAPTER), "openvino": (MODEL, WEIGHTS)}
EXPORTED = (BACKBONE, "spartan", "pfeiffer", "houlsby")
# Only that something was written that answers like PyTorch: with random values, scores need not agree to 1e-4.
_TOLERANCE, _NUM_TEXTS = 1e-2, 8


def export_system(system: str, model: str, folder: Path, precision: str) -> dict[str, str | None]:
    """Write one of :data:`EXPORTED`, adapters with random values, for ONNX Runtime or OpenVINO, as the precision says.

    Returns:
        The files ``graph`` and ``adapter``, of which the backbone has none. OpenVINO reads its ONNX graph.

    Raises:
        UserError: the packages for it are not installed.
        RunFailed: this model cannot be exported.
    """
    format, int8 = export_format(precision) or "", precision.endswith("int8")
    check_format(format, int8)
    if system != BACKBONE:
        task = save_task(model, folder / "saved", method=system)
        exported = folder / "exported"
        export_tasks(
            [task], exported, format=format, int8=int8, model=model, tolerance=_TOLERANCE, max_examples=_NUM_TEXTS
        )
        graph, adapter = _FILES[format]
        return {"graph": str(exported / graph), "adapter": str(exported / TASKS / task.name / adapter)}
    import onnx

    backbone, inputs = load_model(model, torch.float32), list(load_tokenizer(model)("a"))
    backbone.set_attn_implementation(ATTENTION)
    made = to_onnx(trace_alone(backbone, inputs), inputs, [])
    folder.mkdir(parents=True)
    onnx.save(quantize(made) if int8 else made, str(folder / GRAPH))
    return {"graph": str(folder / GRAPH), "adapter": None}
