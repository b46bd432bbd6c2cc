"""Fine-tuning throughput: every method, AdapterHub's adapters, and what each of our options gives.

    python benchmarks/bench_finetuning.py --data-dir DATA --output benchmarks/results/finetuning.json

Few-shot training (200 examples, batch 16) of MiniLM, measured in three groups, each alternating its candidates epoch by
epoch: all methods on real texts (ours in batches by length, AdapterHub's in random batches, padded to the longest or to
128 tokens as ``run_glue.py`` does); the same on texts of 128 tokens; SPARTAN with each option by itself and together.
Every candidate is a process of its own with the same threads. Ours are whole runs of ``sparsepeft.training.train``,
stopped and let go by a callback; the peer's are a bare loop in an environment of its own (see ``peers/``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import save_file
from transformers import AutoConfig

from _common import describe_environment, time_alternating, write_json
from peers._environment import DEFAULT_FOLDER, peer_python
from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.inference.encoding import encode
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.recipes import METHODS, get_recipe
from sparsepeft.tasks import TaskSpec, few_shot, load_task
from sparsepeft_research.benchmarks.workers import Worker

HERE = Path(__file__).resolve().parent
BATCH, EXAMPLES, LENGTH, STEPS = 16, 200, 128, 1000
GROUPS = ("methods", f"methods, {LENGTH} tokens", "options")
EPOCH = -(-EXAMPLES // BATCH)


class Candidate(NamedTuple):
    """Something to time: fields of a RunConfig for ours, settings of ``_adapters_train.py`` for the peer's."""

    name: str
    settings: dict[str, Any]
    is_peer: bool = False
    random_order: bool = False


class Data(NamedTuple):
    """The same examples for both sides: fields of a RunConfig, and token ids in a file."""

    config: dict[str, Any]
    examples: Path
    num_labels: int


def main() -> None:
    """Measure all groups and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data-dir", default=os.environ.get("SPARSEPEFT_DATA"), help="folder with the GLUE tasks")
    parser.add_argument("--task", default="mrpc", help="task whose examples are used")
    parser.add_argument("--model", help="hub id or folder of the backbone; MiniLM if left out")
    parser.add_argument("--repeats", type=int, default=7, help="timed epochs of each candidate")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument("--idle-wait", type=float, default=0.0, help="seconds to wait for an idle machine per round")
    parser.add_argument("--seed", type=int, default=0, help="of the examples and the runs")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="what to measure; all if left out")
    parser.add_argument("--peer-folder", type=Path, default=DEFAULT_FOLDER, help="where the peer's environment is kept")
    parser.add_argument("--quick", action="store_true", help="few candidates and steps, to see that it works")
    options = parser.parse_args()
    if (2 + 2 * options.repeats) * EPOCH > STEPS:
        parser.error(f"--repeats {options.repeats} needs more than the {STEPS} steps that a run has; ask for fewer")
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    options.model = resolve_model(options.model)
    options.peer_python = peer_python(options.peer_folder)
    num_layers = AutoConfig.from_pretrained(options.model).num_hidden_layers
    environment = describe_environment(seed=options.seed)
    groups = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        real, full = real_texts(options, folder), full_length_texts(options, folder)
        plan = {
            GROUPS[0]: (real, methods(options.quick) + peers(options.quick, (None, LENGTH))),
            GROUPS[1]: (full, methods(options.quick) + peers(options.quick, (None,))),
            GROUPS[2]: (real, option_candidates(num_layers, options.quick) + peers(True, (None, LENGTH))),
        }
        for number, name in enumerate(options.groups):
            data, candidates = plan[name]
            print(f"-- {name}", flush=True)
            group_folder = folder / str(number)
            group_folder.mkdir()
            groups[name] = measure(candidates, data, options, group_folder)
    report = {
        "model": describe_backbone(options.model),
        "num_layers": num_layers,
        "task": options.task,
        "batch_size": BATCH,
        "num_examples": EXAMPLES,
        "threads": options.threads,
        "quick": options.quick,
        "groups": groups,
        "environment": environment,
    }
    write_json(options.output, report)


def methods(quick: bool) -> list[Candidate]:
    """Each of our methods with its recipe."""
    return [Candidate(name, {"method": name}) for name in (("spartan", "pfeiffer") if quick else METHODS)]


def peers(only_pfeiffer: bool, paddings: tuple[int | None, ...]) -> list[Candidate]:
    """AdapterHub's adapters of our sizes; padding None is to the longest example of a batch."""
    candidates = []
    for style in ("pfeiffer",) if only_pfeiffer else ("pfeiffer", "houlsby"):
        for length in paddings:
            name = f"adapters {style}" + (f", padded to {length}" if length else "")
            reduction = get_recipe("best", style).adapter["reduction_factor"]
            settings = {"style": style, "reduction_factor": reduction, "pad_to": length}
            candidates.append(Candidate(name, settings, is_peer=True))
    return candidates


def option_candidates(num_layers: int, quick: bool) -> list[Candidate]:
    """SPARTAN as it is, with each option by itself, and with all that go together."""

    def top(k: int) -> dict[str, Any]:
        return {"settings": {"layers_to_transform": list(range(num_layers - k, num_layers))}}

    cached, bf16, compiled = {"cache_frozen_layers": True}, {"precision": "bf16"}, {"compile": True}
    candidates = [
        Candidate("spartan", {}),
        Candidate("spartan, batches in random order", {}, random_order=True),
        Candidate("spartan, bf16", bf16),
    ]
    if not quick:
        candidates.append(Candidate("spartan, compiled", compiled))
    for k in (1,) if quick else range(1, min(4, num_layers)):
        candidates.append(Candidate(f"spartan, top {k}", top(k)))
        candidates.append(Candidate(f"spartan, top {k}, cached", top(k) | cached))
        candidates.append(Candidate(f"spartan, top {k}, cached, bf16", top(k) | cached | bf16))
        if not quick:
            candidates.append(Candidate(f"spartan, top {k}, cached, bf16, compiled", top(k) | cached | bf16 | compiled))
    return candidates


def real_texts(options: argparse.Namespace, folder: Path) -> Data:
    """A few examples of the task, as they are."""
    task = load_task(options.task, data_dir=Path(options.data_dir) if options.data_dir else None)
    chosen = few_shot(task.train, task.spec, EXAMPLES, options.seed)
    config = {"task": options.task, "data_dir": options.data_dir}
    return write_examples(chosen, task.spec, config, options, folder / "real.safetensors")


def full_length_texts(options: argparse.Namespace, folder: Path) -> Data:
    """The task's texts repeated until every example fills the longest input."""
    task = load_task(options.task, data_dir=Path(options.data_dir) if options.data_dir else None)
    some = few_shot(task.train, task.spec, EXAMPLES + EXAMPLES // 4, options.seed)  # a tenth is held out
    columns = task.spec.text_columns
    rows = []
    for row in some:
        label = task.spec.label_names[row["label"]] if task.spec.label_names else row["label"]
        rows.append({"text": " ".join(row[column] for column in columns * LENGTH), "label": label})
    path = folder / "full.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_task("custom", train_file=path)
    chosen = few_shot(data.train, data.spec, EXAMPLES, options.seed)
    config = {"task": "custom", "train_file": str(path)}
    return write_examples(chosen, data.spec, config, options, folder / "full.safetensors")


def write_examples(
    dataset: Dataset, spec: TaskSpec, config: dict[str, Any], options: argparse.Namespace, path: Path
) -> Data:
    """Write the examples' token ids for the peer, padded to the longest input."""
    tokenizer = load_tokenizer(options.model)
    encoded, _ = encode(dataset, spec, tokenizer, LENGTH)
    columns = [name for name in encoded.column_names if name not in ("labels", "length")]
    rows = [{name: row[name] for name in columns} for row in encoded]
    tensors = dict(tokenizer.pad(rows, padding="max_length", max_length=LENGTH, return_tensors="pt"))
    tensors["labels"] = torch.tensor(encoded["labels"][:], dtype=torch.long if spec.label_names else torch.float)
    save_file(tensors, path)
    return Data(config, path, spec.num_labels)


def measure(
    candidates: list[Candidate], data: Data, options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """Time the candidates in turn; one that cannot run is reported with its reason."""
    steps, repeats = (1, 2) if options.quick else (EPOCH, options.repeats)
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for number, candidate in enumerate(candidates):
            try:
                worker = stack.enter_context(start(candidate, data, options, folder / str(number)))
                worker.ask(2 * steps)
            except RuntimeError as error:
                results[candidate.name] = {"failed": str(error)}
                print(f"{candidate.name}: failed, {error}", flush=True)
            else:
                workers[candidate.name] = worker
        epochs = {name: partial(worker.ask, steps) for name, worker in workers.items()}
        timings = time_alternating(epochs, repeats=repeats, warm_up=0, idle_wait_s=options.idle_wait)
    for name, timing in timings.items():
        step_s = timing.median_ms / 1e3 / steps
        preparation_s = workers[name].ready["preparation_s"]
        results[name] = {
            "steps_per_minute": 60 / step_s,
            "preparation_s": preparation_s,
            f"steps_per_minute_of_{STEPS}_with_preparation": 60 * STEPS / (preparation_s + STEPS * step_s),
            "timing_of_steps": steps,
            "timing": timing._asdict(),
        }
    for name in timings:
        results[name]["speed_over"] = {
            other: results[name]["steps_per_minute"] / results[other]["steps_per_minute"]
            for other in timings
            if other != name and (other.startswith("adapters ") or other == "spartan" or name.startswith(f"{other}, "))
        }
        over = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in results[name]["speed_over"].items())
        print(f"{name}: {results[name]['steps_per_minute']:.1f} steps/min; {over}", flush=True)
    return results


def start(candidate: Candidate, data: Data, options: argparse.Namespace, folder: Path) -> Worker:
    """Start a candidate's process."""
    folder.mkdir()
    settings: dict[str, Any] = {"threads": options.threads}
    if candidate.is_peer:
        python, script = options.peer_python, HERE / "peers" / "_adapters_train.py"
        settings |= {"model": options.model, "num_labels": data.num_labels, "examples": str(data.examples)}
        settings |= {"seed": options.seed, "batch_size": BATCH, "learning_rate": 1e-4, "max_steps": STEPS}
        settings |= candidate.settings
    else:
        python, script = sys.executable, HERE / "_finetuning_worker.py"
        config = {"model": options.model, "output_dir": str(folder / "run"), "seed": options.seed}
        config |= {"few_shot": EXAMPLES, "max_steps": STEPS, "batch_size": BATCH, "max_length": LENGTH}
        settings |= {"config": config | data.config | candidate.settings, "random_order": candidate.random_order}
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    return Worker([str(python), str(script), str(path)], options.threads, folder / "log.txt")


if __name__ == "__main__":
    main()
