"""Fine-tuning throughput: every method, AdapterHub's adapters, and what each of our options gives.

    sparsepeft benchmark finetuning --data-dir DATA --output finetuning.json

Few-shot training (200 examples, batch 16) of MiniLM in two groups, each alternating its candidates epoch by epoch: all
methods (ours in batches by length, AdapterHub's in random batches, padded to the longest or to 128 tokens as
``run_glue.py`` does), and SPARTAN with each option by itself and together. Ours are whole runs of
``sparsepeft.training.train``, stopped and let go by a callback; the peer's are a bare loop in an environment of its own
(see ``peers/``). The third group, ``steps``, has the bare loop on both sides, with equal batches: see ``steps.py``.
Every candidate is a process of its own with the same threads.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from datasets import disable_progress_bars
from safetensors.torch import save_file
from transformers import AutoConfig, TrainerCallback

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.inference.encoding import encode
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.recipes import METHODS, get_recipe
from sparsepeft.tasks import few_shot, load_task
from sparsepeft.training import RunConfig, train
from sparsepeft_research.benchmarks.finetuning import steps
from sparsepeft_research.benchmarks.measuring import time_alternating
from sparsepeft_research.benchmarks.registry import Progress
from sparsepeft_research.benchmarks.workers import Worker
from sparsepeft_research.peers.environment import DEFAULT_FOLDER, HERE, peer_python

PEER_TRAINING = HERE / "training.py"
BATCH, EXAMPLES, LENGTH, STEPS = 16, 200, 128, 1000
GROUPS = ("methods", "options", "steps")
EPOCH = -(-EXAMPLES // BATCH)


class Candidate(NamedTuple):
    """Something to time: fields of a RunConfig for our runs, settings of ``peers/training.py`` for bare steps."""

    name: str
    settings: dict[str, Any]
    is_peer: bool = False
    random_order: bool = False
    is_bare: bool = False  # our steps in the peer's loop


@dataclass(frozen=True)
class Settings:
    """What every candidate is measured with."""

    model: str
    peer_python: Path
    repeats: int
    task: str
    data_dir: str
    idle_wait: float
    seed: int
    quick: bool
    only: str
    steps: int = EPOCH  # timed at a time
    bare: dict[str, Any] = field(default_factory=dict)  # batches of those in the bare loop


def run(
    *, model: str, groups: str, peer_folder: str, repeats: int, progress: Progress, **values: Any
) -> dict[str, Any]:
    """Measure the groups.

    Raises:
        UserError: a group is unknown, or more repeats were asked for than a run has steps.
    """
    chosen = groups.split(",") if groups else list(GROUPS)
    for name in chosen:
        if name not in GROUPS:
            raise UserError(unknown_name("The group", name, GROUPS))
    if (2 + 2 * repeats) * EPOCH > STEPS:
        raise UserError(f"`repeats={repeats}` needs more than the {STEPS} steps that a run has; ask for fewer.")
    disable_progress_bars()
    python = peer_python(Path(peer_folder) if peer_folder else DEFAULT_FOLDER)
    models = [resolve_model(one or None) for one in model.split(",")]
    settings = Settings(models[0], python, repeats, **values)
    num_layers = AutoConfig.from_pretrained(settings.model).num_hidden_layers
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            progress(name)
            folder = Path(temporary, name)
            folder.mkdir()
            if name == "steps":
                for one in models:
                    results |= measure_steps(replace(settings, model=one), folder, progress)
            else:
                results[name] = measure_runs(name, num_layers, settings, folder, progress)
    about = {"model": ", ".join(map(describe_backbone, models)), "num_layers": num_layers}
    return {"results": results, "settings": about | {"batch_size": BATCH, "num_examples": EXAMPLES}}


def measure_runs(name: str, num_layers: int, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure a group of whole runs."""
    examples = folder / "examples.safetensors"
    bare = {"num_labels": write_examples(settings, examples), "examples": str(examples)}
    quick = settings.quick
    if name == "methods":
        candidates = methods(quick) + peers(quick)
    else:
        candidates = option_candidates(num_layers, quick) + peers(only_pfeiffer=True)
    bare |= {"batch_size": BATCH, "precision": "fp32"}
    settings = replace(settings, bare=bare, steps=1 if quick else EPOCH)
    return measure(candidates, settings, folder, progress)


def measure_steps(settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure bare steps on one backbone: the candidates that are compared, and the batches, of each set."""
    results, backbone = {}, describe_backbone(settings.model)
    for case in steps.cases(settings.quick):
        for name, ours in steps.candidates(settings.quick).items():
            title = f"steps, {backbone}, {case.batch_size} x {case.length}, {case.precision}, {name}"
            if settings.only not in title:
                continue
            place = folder / str(len(list(folder.iterdir())))
            place.mkdir()
            bare: dict[str, Any] = {"num_labels": 2, "batch_size": case.batch_size, "precision": case.precision}
            bare["examples"] = str(place / "examples.safetensors")
            steps.write_tokens(settings.model, case, settings.seed, Path(bare["examples"]))
            candidates = [Candidate(one, values, is_bare=True) for one, values in ours.items()]
            candidates += [one for one in peers(only_pfeiffer=name != "methods") if one.settings["pad_to"] is None]
            progress(title)
            timed = replace(settings, bare=bare, steps=steps.STEPS)
            results[title] = measure(candidates, timed, place, progress)
    return results


def methods(quick: bool) -> list[Candidate]:
    """Each of our methods with its recipe."""
    return [Candidate(name, {"method": name}) for name in (("spartan", "pfeiffer") if quick else METHODS)]


def peers(only_pfeiffer: bool) -> list[Candidate]:
    """AdapterHub's adapters of our sizes; padding None is to the longest example of a batch."""
    candidates = []
    for style in ("pfeiffer",) if only_pfeiffer else ("pfeiffer", "houlsby"):
        for length in (None, LENGTH):
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


def write_examples(settings: Settings, path: Path) -> int:
    """Write a few examples' token ids for the peer, padded to the longest input; return the number of labels."""
    task = load_task(settings.task, data_dir=Path(settings.data_dir) if settings.data_dir else None)
    tokenizer = load_tokenizer(settings.model)
    chosen = few_shot(task.train, task.spec, EXAMPLES, settings.seed)
    encoded, _ = encode(chosen, task.spec, tokenizer, LENGTH)
    columns = [name for name in encoded.column_names if name not in ("labels", "length")]
    rows = [{name: row[name] for name in columns} for row in encoded]
    tensors = dict(tokenizer.pad(rows, padding="max_length", max_length=LENGTH, return_tensors="pt"))
    tensors["labels"] = torch.tensor(encoded["labels"][:], dtype=torch.long if task.spec.label_names else torch.float)
    save_file(tensors, path)
    return task.spec.num_labels


def measure(
    candidates: list[Candidate], settings: Settings, folder: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Time the candidates in turn; one that cannot run is reported with its reason."""
    repeats = 2 if settings.quick else settings.repeats
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for number, candidate in enumerate(candidates):
            try:
                worker = stack.enter_context(start(candidate, settings, folder / str(number)))
                worker.ask(2 * settings.steps)
            except RuntimeError as error:
                results[candidate.name] = {"failed": str(error)}
                progress(f"{candidate.name}: failed, {error}")
            else:
                workers[candidate.name] = worker
        epochs = {name: partial(worker.ask, settings.steps) for name, worker in workers.items()}
        timings = time_alternating(epochs, repeats=repeats, warm_up=0, idle_wait_s=settings.idle_wait)
    for name, timing in timings.items():
        step_s = timing.median_ms / 1e3 / settings.steps
        preparation_s = workers[name].ready["preparation_s"]
        results[name] = {
            "steps_per_minute": 60 / step_s,
            "preparation_s": preparation_s,
            f"steps_per_minute_of_{STEPS}_with_preparation": 60 * STEPS / (preparation_s + STEPS * step_s),
            "timing_of_steps": settings.steps,
            "timing": timing._asdict(),
        }
    for name in timings:
        results[name]["speed_over"] = {
            other: results[name]["steps_per_minute"] / results[other]["steps_per_minute"]
            for other in timings
            if other != name and (other.startswith("adapters ") or other == "spartan" or name.startswith(f"{other}, "))
        }
        over = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in results[name]["speed_over"].items())
        progress(f"{name}: {results[name]['steps_per_minute']:.1f} steps/min; {over}")
    return results


def start(candidate: Candidate, settings: Settings, folder: Path) -> Worker:
    """Start a candidate's process."""
    folder.mkdir()
    process_settings: dict[str, Any] = {"threads": torch.get_num_threads()}
    if candidate.is_peer or candidate.is_bare:
        ours = [sys.executable, "-m", steps.__name__]
        command = ours if candidate.is_bare else [str(settings.peer_python), str(PEER_TRAINING)]
        process_settings |= {"model": settings.model, "seed": settings.seed, "learning_rate": 1e-4}
        process_settings |= {"max_steps": STEPS} | settings.bare | candidate.settings
    else:
        command = [sys.executable, "-m", __spec__.name]
        config = {"model": settings.model, "output_dir": str(folder / "run"), "seed": settings.seed}
        config |= {"few_shot": EXAMPLES, "max_steps": STEPS, "batch_size": BATCH, "max_length": LENGTH}
        config |= {"task": settings.task, "data_dir": settings.data_dir or None}
        process_settings |= {"config": config | candidate.settings, "random_order": candidate.random_order}
    return Worker(command, process_settings, folder / "settings.json")


class Gate(TrainerCallback):
    """Lets a run go on for as many steps as the next line of the input says."""

    def __init__(self, answers: TextIO, random_order: bool) -> None:
        self.answers, self.random_order = answers, random_order
        self.start = time.perf_counter()
        self.asked = self.left = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take batches in random order instead of by length, where that is to be measured."""
        if self.random_order:
            args.train_sampling_strategy = "random"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer and wait, when the steps that were asked for are done."""
        if self.left == 0:
            seconds = time.perf_counter() - self.start
            answer = {"steps": self.asked} if self.asked else {"preparation_s": seconds}
            print(json.dumps(answer), file=self.answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self.asked = self.left = int(line)
        self.left -= 1


def main() -> None:
    """One of our candidates: say ``{"preparation_s": ...}``, then run as many steps as each line of the input says."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    train(RunConfig(**settings["config"]), callbacks=[Gate(answers, settings["random_order"])])


if __name__ == "__main__":
    main()
