"""Writing a traced model as ONNX: adapters as inputs that may be left out, weights in float32 or int8."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from sparsepeft.errors import RunFailed, UserError, first_line
from sparsepeft.export.graph import quiet
from sparsepeft.export.job import Job
from sparsepeft.export.tasks import Shape
from sparsepeft.models.quantized import SCALE, is_stored_as_int8

if TYPE_CHECKING:
    import onnx

# Both are read by ONNX Runtime 1.20 and later, and handled by its quantizer. Before opset 20 GELU is five operators.
OPSET, IR_VERSION = 20, 10
# Of SDPA the exporter makes masks in every layer and looks for rows without any key, a tenth of an int8 model's time.
ATTENTION = "eager"
_MAX_BYTES = 2_000_000_000  # a protobuf file ends at 2 GiB


def graph_of(job: Job) -> onnx.ModelProto:
    """The job's model as ONNX; the adapter's tensors are plain inputs.

    Raises:
        UserError: the backbone is too large for one file.
        RunFailed: it cannot be traced or written.
    """
    size = sum(parameter.nbytes for parameter in job.graph.model.parameters())
    if size > _MAX_BYTES:
        raise UserError(
            f"{job.backbone_name} has {size / 1e9:.1f} GB in float32, but one ONNX file holds at most 2 GB; export "
            "tasks of a smaller backbone."
        )
    job.progress("tracing the backbone")
    job.graph.model.set_attn_implementation(ATTENTION)
    program = job.graph.trace(job.inputs, job.shapes)
    job.progress("writing it as ONNX")
    return to_onnx(program, job.inputs, list(job.shapes), job.outputs)


def to_onnx(
    program: ExportedProgram, inputs: Sequence[str], tensors: Sequence[str], outputs: Sequence[str] = ("logits",)
) -> onnx.ModelProto:
    """The ONNX form of ``TaskGraph.trace``'s program; the adapter's tensors are plain inputs.

    Raises:
        RunFailed: an operator has no ONNX form.
    """
    import torch.onnx

    with quiet():
        try:
            made = torch.onnx.export(
                program,
                input_names=[*inputs, *tensors],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise RunFailed(f"The traced model could not be written as ONNX ({first_line(error)}).") from error
    assert made is not None
    return made.model_proto


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with the backbone's weights in int8, activations quantized as they come.

    ``model`` loses its record of shapes in between. Must come before :func:`open_adapter`: the quantizer takes an input
    with an initial value for a constant. Inputs without one it leaves alone, and with them all of the memories' and
    heads' products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Shapes in between are inferred again; some that the exporter wrote are those from before it folded a transpose.
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(str(path))


def open_adapter(
    model: onnx.ModelProto, shapes: Mapping[str, Shape], int8: bool, optional: Collection[str] = ()
) -> onnx.ModelProto:
    """Let the adapter's inputs be left out of the feeds, so that ONNX Runtime fills them from an ``.onnx_adapter``.

    Each gets an initial value of size zero; without one, a session calls the input missing. A graph that is run without
    an adapter therefore ends in an error. Tensors that some adapters lack are zeros there, of as little size as fits.

    Args:
        model: from :func:`to_onnx` or :func:`quantize`; changed in place.
        shapes: of the adapter's tensors.
        int8: they come as :func:`sparsepeft.models.quantized.quantize` makes them.
        optional: names of those that some adapters lack.

    Returns:
        ``model``, whose graph is named after its content.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    first: list[onnx.NodeProto] = []
    for tensor in list(graph.input):
        if tensor.name not in shapes:
            continue
        dims = [size or f"{tensor.name}.{dim}" for dim, size in enumerate(shapes[tensor.name])]
        is_optional = tensor.name in optional
        if not is_optional:
            dims[0] = f"{tensor.name}.0"  # open in any case: it is zero in the initial value
        kind = TensorProto.FLOAT
        if int8 and is_stored_as_int8(shapes[tensor.name]):
            kind, scale = TensorProto.INT8, tensor.name + SCALE
            _add_input(graph, scale, TensorProto.FLOAT, [*dims[:-1], 1], is_optional)
            used = f"{tensor.name}.float"
            for node in graph.node:
                node.input[:] = [used if name == tensor.name else name for name in node.input]
            first += [
                helper.make_node("Cast", [tensor.name], [f"{used}.unscaled"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{used}.unscaled", scale], [used]),
            ]
        graph.input.remove(tensor)
        _add_input(graph, tensor.name, kind, dims, is_optional)
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    model.ir_version = IR_VERSION
    graph.name = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return model


def _add_input(graph: onnx.GraphProto, name: str, kind: int, dims: Sequence[int | str], has_zeros: bool) -> None:
    from onnx import helper

    graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    least = [size if isinstance(size, int) else 1 for size in dims]
    if not has_zeros:
        least[0] = 0
    graph.initializer.append(helper.make_tensor(name, kind, least, [0] * math.prod(least)))
