"""Systems as ONNX Runtime runs them."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsepeft.benchmarking.inference.systems import BACKBONE, load_model, save_task
from sparsepeft.export import export_tasks
from sparsepeft.export.files import TASKS
from sparsepeft.export.formats import check_format
from sparsepeft.export.graph import trace_alone
from sparsepeft.export.onnx_files import ADAPTER, GRAPH
from sparsepeft.export.onnx_graph import ATTENTION, quantize, to_onnx
from sparsepeft.training.methods import load_tokenizer

EXPORTED = (BACKBONE, "spartan", "pfeiffer", "houlsby")
# Only that something was written that answers like PyTorch: with random values, scores need not agree to 1e-4.
_TOLERANCE, _NUM_TEXTS = 1e-2, 8


def export_system(system: str, model: str, folder: Path, *, int8: bool) -> dict[str, str | None]:
    """Write one of :data:`EXPORTED` for ONNX Runtime, adapters with random values.

    Returns:
        The files ``graph`` and ``adapter``, of which the backbone has none.

    Raises:
        UserError: the packages for it are not installed.
        RunFailed: this model cannot be exported.
    """
    check_format("onnx")
    if system != BACKBONE:
        task = save_task(model, folder / "saved", method=system)
        exported = folder / "exported"
        export_tasks([task], exported, int8=int8, model=model, tolerance=_TOLERANCE, max_examples=_NUM_TEXTS)
        return {"graph": str(exported / GRAPH), "adapter": str(exported / TASKS / task.name / ADAPTER)}
    import onnx

    backbone, inputs = load_model(model, torch.float32), list(load_tokenizer(model)("a"))
    backbone.set_attn_implementation(ATTENTION)
    graph = to_onnx(trace_alone(backbone, inputs), inputs, [])
    folder.mkdir(parents=True)
    onnx.save(quantize(graph) if int8 else graph, str(folder / GRAPH))
    return {"graph": str(folder / GRAPH), "adapter": None}
