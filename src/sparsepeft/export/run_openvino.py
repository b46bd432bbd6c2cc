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
        texts = [_read(one, task["num_texts"]) for one in ([texts] if isinstance(texts, (str, dict)) else texts)]
        if name not in self.adapters:
            file = self.folder / "tasks" / name / "adapter_model.safetensors"
            if [task["graph"], task["sha256"]] != [self.graph, hashlib.sha256(file.read_bytes()).hexdigest()]:
                raise ValueError(f"{file} is damaged, or belongs to another backbone.xml; export the task again")
            tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()}
            self.adapters[name] = {key: ov.Tensor(tensor) for key, tensor in tensors.items()}
        for i in range(0, len(texts), batch_size):
            self.tokenizer.enable_truncation(task["max_length"])
            encoded = self.tokenizer.encode_batch(texts[i : i + batch_size])
            ids, mask, types = np.array([(e.ids, e.attention_mask, e.type_ids) for e in encoded]).transpose(1, 0, 2)
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}  # (B, T) each
            if self.active != name:  # between two batches another task may have answered
                for key, tensor in self.adapters[name].items():
                    self.request.set_tensor(key, tensor)
                self.active = name
            logits = self.request.infer({key: feed[key] for key in self.inputs & feed.keys()})[0]
            yield from (_answer(task["labels"], task["multi_label"], row) for row in logits.astype(float))


def _read(given, num_texts):
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if isinstance(given, dict) and "text" in given and given.keys() <= {"text", "text_pair"}:
        parts = tuple(given[key] for key in ("text", "text_pair") if given.get(key) is not None)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"an input is {given!r:.80}; expected a text, a pair, or a dict with text and text_pair")
    if num_texts and len(parts) != num_texts:
        raise ValueError(f"an input has {len(parts)} text(s), but the task takes {num_texts} per input")
    if any("\ud800" <= character <= "\udfff" for part in parts for character in part):
        raise ValueError(f"an input is {given!a:.80}, with half of a surrogate pair, which is no character")
    return parts if len(parts) == 2 else parts[0]


def _answer(labels, multi_label, logits):
    scores = 1 / (1 + np.exp(-logits)) if multi_label else np.exp(logits - np.logaddexp.reduce(logits))
    best = int(scores.argmax())
    named = {label: float(score) for label, score in zip(labels or (), scores, strict=False)}
    return {"label": labels and labels[best], "score": float((scores if labels else logits)[best]), "scores": named}


if __name__ == "__main__":
    try:
        runner, (name, *given) = Runner(Path(__file__).parent), sys.argv[1:] or sys.exit(__doc__)
        for line in ["\t".join(given)] if given else sys.stdin:
            parts = line.rstrip("\r\n").split("\t")
            print(*map(json.dumps, runner.answer(name, [tuple(parts) if parts[1:] else parts[0]])), flush=True)
    except ValueError as error:
        sys.exit(f"Error: {error}")
