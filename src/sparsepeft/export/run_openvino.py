"""python run.py TASK [TEXT [TEXT]]: answers texts, or lines of standard input (with a tab between two texts)."""

from pathlib import Path

import numpy as np
import openvino as ov
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from sparsepeft.inference.portable import ExportedTasks, main


class Runner(ExportedTasks):
    """One backbone and its tasks in OpenVINO; ``precision``: f32, bf16 or OpenVINO's own choice."""

    weights = "adapter_model.safetensors"

    def __init__(self, folder: str | Path, threads: int = 0, precision: str | None = None) -> None:
        options = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        compiled = ov.compile_model(Path(folder) / "backbone.xml", "CPU", options)
        self.request = compiled.create_infer_request()
        self.active: dict[str, ov.Tensor] | None = None
        self.inputs = {each.any_name for each in compiled.inputs}
        for each in compiled.inputs:  # what a task lacks, a head of the other kind, is zeros
            shape = [size.get_length() if size.is_static else 1 for size in each.partial_shape]
            self.request.set_tensor(each, ov.Tensor(np.zeros(shape, each.element_type.to_dtype())))
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        super().__init__(folder, tokenizer, compiled.get_property("NETWORK_NAME"))

    def load(self, file: Path) -> dict[str, ov.Tensor]:
        """A task's tensors by their names in the model."""
        names = self.tasks[file.parent.name].get("names", {})
        tensors = {key.removeprefix("base_model.model."): ov.Tensor(value) for key, value in load_file(file).items()}
        return {names.get(key, key): tensor for key, tensor in tensors.items()}

    def logits(
        self, adapter: dict[str, ov.Tensor], inputs: dict[str, np.ndarray], of_tokens: bool = False
    ) -> np.ndarray:
        """(B, number of labels), or (B, T, number of labels) of the tokens."""
        if self.active is not adapter:  # between two batches another task may have answered
            for key, tensor in adapter.items():
                self.request.set_tensor(key, tensor)
            self.active = adapter
        return self.request.infer({key: inputs[key] for key in self.inputs & inputs.keys()})[int(of_tokens)]


if __name__ == "__main__":
    main(Runner, Path(__file__).parent, __doc__ or "")
