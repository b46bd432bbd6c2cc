"""The formats, and what each needs."""

from __future__ import annotations

import importlib.metadata

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.extras import require

# Modules, each of a package with the name before the first dot.
_MODULES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": (
        "executorch.exir",
        "executorch.runtime",
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
    ),
}
_WHY_NOT_INT8 = {
    "openvino": "it computes in bfloat16 instead, where the processor has it",
    "executorch": "quantizing for it needs example texts for its calibration, which is not built in",
}
FORMATS = tuple(_MODULES)


def check_format(format: str, int8: bool = False) -> None:
    """See that a format can be written here.

    Raises:
        UserError: there is none of that name, its packages are not installed, or it has no int8.
    """
    if format not in FORMATS:
        raise UserError(unknown_name("The format", format, FORMATS))
    if int8 and format in _WHY_NOT_INT8:
        raise UserError(
            f"`int8=True` was given with `format={format}`, which has none: {_WHY_NOT_INT8[format]}; leave it out, or "
            "pass `format=onnx`."
        )
    for module in _MODULES[format]:
        require(module, f"export-{format}", f"The format {format}")


def versions(format: str) -> dict[str, str]:
    """Of the format's packages."""
    return {name: importlib.metadata.version(name) for name in (module.split(".")[0] for module in _MODULES[format])}
