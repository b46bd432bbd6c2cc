"""python run.py TASK [TEXT [TEXT]]: answers texts, or lines of standard input (with a tab between two texts)."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from sparsepeft.inference.portable import ExportedTasks, main


class Runner(ExportedTasks):
    """One backbone and its tasks in ONNX Runtime; ``tasks`` has each task.json by name."""

    weights = "adapter.onnx_adapter"

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        self.session = ort.InferenceSession(Path(folder) / "backbone.onnx", options, ["CPUExecutionProvider"])
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        super().__init__(folder, tokenizer, self.session.get_modelmeta().graph_name)

    def load(self, file: Path) -> ort.LoraAdapter:
        """A task's tensors."""
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
        return adapter

    def logits(self, adapter: ort.LoraAdapter, inputs: dict[str, np.ndarray], of_tokens: bool = False) -> np.ndarray:
        """(B, number of labels), or (B, T, number of labels) of the tokens."""
        options = ort.RunOptions()
        options.add_active_adapter(adapter)  # one: of two with the same names, one is silently ignored
        logits: np.ndarray = self.session.run(
            None, {i.name: inputs[i.name] for i in self.session.get_inputs()}, options
        )[int(of_tokens)]
        return logits


if __name__ == "__main__":
    main(Runner, Path(__file__).parent, __doc__ or "")
