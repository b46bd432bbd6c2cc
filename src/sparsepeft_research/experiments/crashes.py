"""Training that SIGKILL ends at random moments: does it go on, and end as if it had not been ended?

    python -m sparsepeft_research.experiments.crashes --data-dir DATA [--language-model FOLDER] --seed 0

Each setting is trained once without interruption. Then it is trained anew, several times, and killed on the way, some
twice in a row: before a random operation on a file of the folder, shortly after a random file of a checkpoint (or
of the frozen layers' cache, or of the final result) has appeared, or after a random time. The same command is given
until it ends. Weights, scores and history must then be those of the uninterrupted training, bit for bit, and training
must have gone on from the newest checkpoint that was complete. With ``--overwrite`` over a finished run, that run's
files and answers must be as before until the new run is in its place.

The result, ``crashes.json``, has a log of every kill. It is written after every run, and what is in it is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from sparsepeft.errors import RunFailed
from sparsepeft.folders import UNFINISHED, write_json
from sparsepeft.provenance import environment
from sparsepeft.runs.files import CHECKPOINTS, HISTORY, RESULTS
from sparsepeft.runs.history import read_lines
from sparsepeft.training import Predictor, train  # noqa: F401, so that the forked processes have them
from sparsepeft_research.experiments.killing import (
    CACHING,
    CHECKPOINT,
    END,
    OPERATION,
    TIME,
    Course,
    Moment,
    draw,
    has_trained,
    import_all,
    run,
)
from sparsepeft_research.results import RESULTS as FOLDER
from sparsepeft_research.results import Result, write_result

_TOPICS = "--task topics --max-steps 8 --eval-steps 2 --batch-size 8 --max-length 16 --score-on selection"
_SPT = "--spt --spt-set num_blocks=4 --spt-set num_active_blocks=2 --spt-set values=routed"
SETTINGS = {
    "spartan": f"{_TOPICS} --method spartan",
    "spartan-cached": f"{_TOPICS} --method spartan --set layers_to_transform=[4,5] --cache-frozen-layers",
    "full": f"{_TOPICS} --method full",
    "lora": f"{_TOPICS} --method lora",
    "language-model": f"--task lm --max-steps 8 --block-length 64 --batch-size 8 {_SPT}",
}
FORMER, NEW = "lora", "spartan"  # the runs of --overwrite
KINDS = CHECKPOINT, OPERATION, END, TIME
MAX_KILLS = 2
_TEXTS = "The striker scored twice in the second half.", "Shares fell on Monday.", "A new vaccine was approved."
_NOT_COMPARED = ("train_seconds", "others_cpu_share", "environment")  # of the results


def main() -> None:
    """Do what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="with wikitext-2, for the language model")
    parser.add_argument("--language-model", type=Path, help="a small one, whose FFNs four blocks divide")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=4, help="that are killed, of each setting")
    parser.add_argument("--overwrites", type=int, default=4, help="that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sparsepeft-crashes")
    parser.add_argument("--results", type=Path, default=FOLDER / "crashes.json", help="the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums of another order have other last bits
    options.work.mkdir(parents=True, exist_ok=True)
    if options.language_model is None:
        options.settings = [name for name in options.settings if name != "language-model"]
    done = json.loads(options.results.read_text())["results"] if options.results.exists() else {}
    report: dict[str, dict[str, Any]] = {"runs": done.get("runs", {}), "overwrites": done.get("overwrites", {})}
    experiment = _Experiment(options)
    for number in range(options.runs):
        for index, setting in enumerate(options.settings):
            if (name := f"{setting}-{number}") not in report["runs"]:
                kind = CACHING if (setting, number) == ("spartan-cached", 0) else KINDS[(number + index) % len(KINDS)]
                report["runs"][name] = experiment.killed_run(setting, name, kind)
                _write(options, report, name)
    for number in range(options.overwrites):
        if (name := f"overwrite-{number}") not in report["overwrites"]:
            report["overwrites"][name] = experiment.killed_overwrite(name, KINDS[number % len(KINDS)])
            _write(options, report, name)


def _write(options: argparse.Namespace, report: dict[str, Any], name: str) -> None:
    parts = {part: list(report[part].values()) for part in ("runs", "overwrites")}
    summary = {
        part: {
            "started": len(each),
            "survived": sum(one["survived"] for one in each),
            "kills": sum(len(one["kills"]) for one in each),
        }
        for part, each in parts.items()
    }
    settings = {name: SETTINGS[name] for name in options.settings} | {"threads": torch.get_num_threads()}
    result = Result("crashes", settings, report, environment(), options.seed, {"summary": summary})
    write_result(options.results, result)
    print(f"{name:<24} {summary}", flush=True)


class _Experiment:
    """The runs, in a folder of their own; those without interruption stay there for the next start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.seed, self._log = options.work, options.seed, options.work / "log.txt"
        self._arguments = {name: [*SETTINGS[name].split(), "--data-dir", str(options.data_dir)] for name in SETTINGS}
        import_all(self._log)
        if options.language_model is not None:
            text = (options.data_dir / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
            for name, part in (("text", text[:60_000]), ("validation-text", text[60_000:70_000])):
                file = self.work / f"{name}.txt"
                file.write_text(part, encoding="utf-8")
                self._arguments["language-model"] += [f"--{name}", str(file)]
            self._arguments["language-model"] += ["--model", str(options.language_model)]

    def killed_run(self, setting: str, name: str, kind: str) -> dict[str, Any]:
        """Train, kill, go on; what came of it."""
        folder, (whole, _) = self.work / name, self._whole(setting)
        kills, course = self._until_it_ends(setting, folder, kind, lambda: None, lambda kill: False)
        is_done = course.code == 0 or (course.code == 2 and kills[-1]["is_finished"])
        return _judged(kills, is_done, _differences(folder, whole))

    def killed_overwrite(self, name: str, kind: str) -> dict[str, Any]:
        """Train over a finished run, kill, see what the folder answers, go on; what came of it."""
        folder, (former, _), (new, _) = self.work / name, self._whole(FORMER), self._whole(NEW)
        files = {path.name: path.read_bytes() for path in former.iterdir() if path.is_file()}
        answers = {self._answers(former): "the former run", self._answers(new): "the new run"}

        def look(kill: dict[str, Any]) -> bool:
            kill["former_files_are_unchanged"] = all(_content(folder / each) == files[each] for each in files)
            kill["answered_by"] = answers.get(self._answers(folder), "neither")
            kill["is_finished"] = kill["answered_by"] == "the new run"
            return bool(kill["is_finished"])

        kills, course = self._until_it_ends(
            NEW, folder, kind, lambda: shutil.copytree(former, folder), look, "--overwrite"
        )
        is_kept = all(
            kill["is_finished"] or (kill["former_files_are_unchanged"] and kill["answered_by"] == "the former run")
            for kill in kills
        )
        is_done = course.code == 0 or kills[-1]["is_finished"]
        return _judged(kills, is_done and is_kept, _differences(folder, new))

    def _until_it_ends(
        self,
        setting: str,
        folder: Path,
        kind: str,
        prepare: Callable[[], object],
        is_enough: Callable[[dict[str, Any]], bool],
        *more: str,
    ) -> tuple[list[dict[str, Any]], Course]:
        """Give a command until it ends; its kills, and the last course."""
        whole, random = self._whole(setting)[1], Random(f"{self.seed}-{folder.name}")
        planned = [kind, *random.choices(KINDS, k=random.randrange(MAX_KILLS))]
        kills: list[dict[str, Any]] = []
        while True:
            if not kills:  # also where a moment came too late
                shutil.rmtree(folder, ignore_errors=True)
                prepare()
            moment = draw(random, planned[len(kills)], whole) if len(kills) < len(planned) else None
            course = self._train(setting, folder, moment, *more)
            if kills:
                kills[-1]["resumed_from"] = _resumed_from(course)
            if moment is None or (kills and not course.was_killed):
                return kills, course
            if course.was_killed:
                kills.append({"moment": vars(moment), "seconds": course.seconds} | _state(folder))
                if is_enough(kills[-1]):
                    return kills, course

    def _whole(self, setting: str) -> tuple[Path, Course]:
        """The folder of the training that nothing interrupts, and its course."""
        folder = self.work / f"whole-{setting}"
        file = folder.with_suffix(".json")
        if not file.exists():
            shutil.rmtree(folder, ignore_errors=True)
            course = self._train(setting, folder, None)
            if course.code:
                raise RunFailed(f"{setting} cannot be trained: {course.said}")
            write_json(file, vars(course))
            import_all(self._log)
        return folder, Course(**json.loads(file.read_text(encoding="utf-8")))

    def _train(self, setting: str, folder: Path, moment: Moment | None, *more: str) -> Course:
        arguments = ["train", *self._arguments[setting], "--device", "cpu", "--output-dir", str(folder), *more]
        return run(arguments, folder, self._log, moment)

    def _answers(self, folder: Path) -> bytes:
        texts, answers = self.work / "texts.txt", self.work / "answers.jsonl"
        texts.write_text("\n".join(_TEXTS) + "\n", encoding="utf-8")
        answers.unlink(missing_ok=True)
        run(["predict", str(folder), "--file", str(texts), "--output", str(answers)], folder, self._log)
        return _content(answers)


def _state(folder: Path) -> dict[str, Any]:
    """What a killed run has left."""
    parts = [folder / name for name in (UNFINISHED, ".finished", ".moving") if (folder / name).is_dir()]
    lines = read_lines((parts or [folder])[0] / HISTORY)
    files = Counter(str(path.parent.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    step, is_finished = lines[-1]["step"] if lines else 0, not (folder / UNFINISHED).exists() and files.total() > 1
    return {
        "step": step,
        "last_good_step": step if has_trained(folder) else _last_good_step(folder / UNFINISHED / CHECKPOINTS),
        "files": dict(sorted(files.items())),
        "is_finished": is_finished,
    }


def _last_good_step(checkpoints: Path) -> int:
    """Of the newest checkpoint whose last file was written."""
    steps = [0]
    for file in checkpoints.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            steps.append(json.loads(file.read_text())["global_step"])
    return max(steps)


def _resumed_from(course: Course) -> int | None:
    """The step that a run said it goes on from; None where it said nothing, as before the data are read."""
    found = re.search(r"going on from step ([\d,]+)", course.said)
    return int(found.group(1).replace(",", "")) if found else 0 if "output: " in course.said else None


def _differences(folder: Path, whole: Path) -> list[str]:
    """Names of what is not as the uninterrupted run has it: tensors, results, history."""
    found, expected = _tensors(folder), _tensors(whole)
    differing = [name for name in sorted(found.keys() | expected.keys()) if not _same(found, expected, name)]
    one, other = ({**json.loads((each / RESULTS).read_text())} for each in (folder, whole))
    differing += [
        key for key in one.keys() | other.keys() if key not in _NOT_COMPARED and one.get(key) != other.get(key)
    ]
    histories = [[line | {"seconds": 0} for line in read_lines(each / HISTORY)] for each in (folder, whole)]
    return differing + ([HISTORY] if histories[0] != histories[1] else [])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> bool:
    if name not in found or name not in expected:
        return False
    return found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])


def _judged(kills: list[dict[str, Any]], is_done: bool, differing: list[str]) -> dict[str, Any]:
    lost = [kill for kill in kills if kill.get("resumed_from") not in (None, kill["last_good_step"])]
    return {"survived": is_done and not differing and not lost, "differing": differing, "kills": kills}


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


if __name__ == "__main__":
    main()
