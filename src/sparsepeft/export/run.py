"""python run.py TASK [TEXT [TEXT]]: answers texts, or lines of standard input (with a tab between two texts)."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


class Runner:
    """One backbone and its tasks; ``tasks`` has each task.json by name."""

    def __init__(self, folder, threads=0):
        self.folder, self.adapters, options = Path(folder), {}, ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        self.session = ort.InferenceSession(self.folder / "backbone.onnx", options, ["CPUExecutionProvider"])
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
            file, graph = self.folder / "tasks" / name / "adapter.onnx_adapter", self.session.get_modelmeta().graph_name
            if [task["graph"], task["sha256"]] != [graph, hashlib.sha256(file.read_bytes()).hexdigest()]:
                raise ValueError(f"{file} is damaged, or belongs to another backbone.onnx; export the task again")
            self.adapters.setdefault(name, ort.LoraAdapter()).Load(str(file))
        options, encode = ort.RunOptions(), self.tokenizer.encode_batch
        options.add_active_adapter(self.adapters[name])  # one: of two with the same names, one is silently ignored
        for i in range(0, len(given), batch_size):
            self.tokenizer.enable_truncation(task["max_length"])
            rows = np.array([(e.ids, e.attention_mask, e.type_ids) for e in encode(given[i : i + batch_size])], "int64")
            feed = {"input_ids": rows[:, 0], "attention_mask": rows[:, 1], "token_type_ids": rows[:, 2]}  # (B, T) each
            logits = self.session.run(None, {i.name: feed[i.name] for i in self.session.get_inputs()}, options)[0]
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
