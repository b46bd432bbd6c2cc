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
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        super().__init__(folder, tokenizer, compiled.get_property("NETWORK_NAME"))

    def load(self, file: Path) -> dict[str, ov.Tensor]:
        """A task's tensors by their names in the model."""
        return {key.removeprefix("base_model.model."): ov.Tensor(value) for key, value in load_file(file).items()}

    def logits(self, adapter: dict[str, ov.Tensor], inputs: dict[str, np.ndarray]) -> np.ndarray:
        """(B, number of labels)."""
        if self.active is not adapter:  # between two batches another task may have answered
            for key, tensor in adapter.items():
                self.request.set_tensor(key, tensor)
            self.active = adapter
        return self.request.infer({key: inputs[key] for key in self.inputs & inputs.keys()})[0]


if __name__ == "__main__":
    main(Runner, Path(__file__).parent, __doc__ or "")
