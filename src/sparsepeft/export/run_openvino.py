"""python run.py TASK [TEXT [TEXT]]: answers texts, or lines of standard input (with a tab between two texts)."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Runner:
    """One backbone and its tasks; ``tasks`` has each task.json by name; ``precision``: f32, bf16 or OpenVINO's own."""

    def __init__(self, folder, threads=0, precision=None):
        self.folder, self.adapters, self.active = Path(folder), {}, None
        options = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        self.request = ov.compile_model(self.folder / "backbone.xml", "CPU", options).create_infer_request()
        compiled = self.request.get_compiled_model()
        self.graph, self.inputs = compiled.get_property("NETWORK_NAME"), {i.any_name for i in compiled.inputs}
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tasks = {file.parent.name: json.loads(file.read_bytes()) for file in self.folder.glob("tasks/*/task.json")}

    def answer(self, name, texts, batch_size=8):
        """Yield a dict with label, score and scores for each text, pair, or dict with text and text_pair."""
        if (task := self.tasks.get(name)) is None:
            raise ValueError(f"the task {name!r} is unknown; there are {', '.join(sorted(self.tasks))}")
        given, labels = [], task["labels"]
        for one in [texts] if isinstance(texts, (str, dict)) else texts:
            if isinstance(one, dict) and {"text"} <= one.keys() <= {"text", "text_pair"}:
                one = [one[key] for key in sorted(one) if one[key] is not None]
            parts = tuple(one) if isinstance(one, (list, tuple)) else (one,)
            if task["num_texts"] not in (None, len(parts)) or len(parts) > 2 or {*map(type, parts)} != {str}:
                raise ValueError(f"an input is {one!r:.60}; the task takes {task['num_texts'] or '1 or 2'} text(s)")
            "".join(parts).encode()  # half of a surrogate pair is a ValueError, too
            given.append(parts if parts[1:] else parts[0])
        if name not in self.adapters:
            file = self.folder / "tasks" / name / "adapter_model.safetensors"
            if [task["graph"], task["sha256"]] != [self.graph, hashlib.sha256(file.read_bytes()).hexdigest()]:
                raise ValueError(f"{file} is damaged, or belongs to another backbone.xml; export the task again")
            tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()}
            self.adapters[name] = {key: ov.Tensor(tensor) for key, tensor in tensors.items()}
        for i in range(0, len(given), batch_size):
            self.tokenizer.enable_truncation(task["max_length"])
            encoded = self.tokenizer.encode_batch(given[i : i + batch_size])
            ids, mask, types = np.array([(e.ids, e.attention_mask, e.type_ids) for e in encoded]).transpose(1, 0, 2)
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}  # (B, T) each
            if self.active != name:  # between two batches another task may have answered
                for key, tensor in self.adapters[name].items():
                    self.request.set_tensor(key, tensor)
                self.active = name
            logits = self.request.infer({key: feed[key] for key in self.inputs & feed.keys()})[0]
            for row in logits.astype(float):
                scores = 1 / (1 + np.exp(-row)) if task["multi_label"] else np.exp(row - np.logaddexp.reduce(row))
                top, named = labels and labels[scores.argmax()], dict(zip(labels or (), scores.tolist(), strict=False))
                yield {"label": top, "score": named.get(top, float(row[0])), "scores": named}


if __name__ == "__main__":
    try:
        runner, (name, *given) = Runner(Path(__file__).parent), sys.argv[1:] or sys.exit(__doc__)
        for line in ["\t".join(given)] if given else sys.stdin:
            print(*map(json.dumps, runner.answer(name, [line.rstrip("\r\n").split("\t")])), flush=True)
    except ValueError as error:
        sys.exit(f"Error: {error}")
