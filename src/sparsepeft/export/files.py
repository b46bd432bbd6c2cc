"""What stands in an exported folder."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sparsepeft.errors import UserError
from sparsepeft.export.tasks import ExportTask, Tensors
from sparsepeft.folders import write_json
from sparsepeft.models.quantized import INT8, cast_for_saving
from sparsepeft.runs.files import RUN
from sparsepeft.tuners.files import PEFT_PREFIX

REPORT, RUNNER, TOKENIZER, TASKS = "export.json", "run.py", "tokenizer.json", "tasks"
PORTABLE = "portable.py"  # of sparsepeft.inference
WRITTEN = (REPORT, RUNNER, PORTABLE, TOKENIZER, TASKS, "backbone.*")
OPENVINO_RUNNER = "run_openvino.py"  # of this package; in an exported folder each format's is run.py
WEIGHTS, ADAPTER = "adapter_model.safetensors", "adapter.onnx_adapter"  # of a task, for PEFT and for ONNX Runtime
_CONFIG = "adapter_config.json"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the tokenizer for the library ``tokenizers``, which pads by itself then.

    Raises:
        UserError: it is not one of that library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"The backbone's tokenizer {type(tokenizer).__name__} is not one of the library tokenizers, which the "
            "exported runner needs; export a backbone with a fast tokenizer."
        )
    copied = Tokenizer.from_str(backend.to_str())
    copied.no_truncation()
    copied.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        pad_type_id=tokenizer.pad_token_type_id,
    )
    copied.save(str(path))


def write_task(task: ExportTask, tensors: Tensors, folder: Path, int8: bool) -> Tensors:
    """Write a task's folder as PEFT, the engine and ``Predictor`` read it, in float32 or int8.

    Returns:
        The tensors as they are in the file, without PEFT's prefix.
    """
    folder.mkdir(parents=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stored = cast_for_saving(stored, INT8) if int8 else stored
    weights = {PEFT_PREFIX + name: tensor for name, tensor in stored.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((task.info.folder / _CONFIG).read_text(encoding="utf-8"))
    write_json(folder / _CONFIG, config | {"save_dtype": INT8 if int8 else None})
    for name in (RUN, "README.md"):
        if (task.info.folder / name).is_file():
            shutil.copyfile(task.info.folder / name, folder / name)
    return stored


def write_onnx_adapter(tensors: Tensors, path: Path) -> None:
    """Write tensors as ONNX Runtime swaps them into a graph."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in tensors.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(path))


def write_runner(folder: Path, source_name: str) -> None:
    """Write ``run.py`` from a module of this package, and the file that it answers by beside it."""
    source = (resources.files("sparsepeft.export") / source_name).read_text(encoding="utf-8")
    source = source.replace("from sparsepeft.inference.portable", "from portable")
    (folder / RUNNER).write_text(source, encoding="utf-8")
    (folder / PORTABLE).write_bytes((resources.files("sparsepeft.inference") / PORTABLE).read_bytes())


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that stand in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
