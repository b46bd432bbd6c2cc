"""Whole comparisons on a tiny model: rows, resuming, what fails, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.matrices import Recorder
from tests.tiny import Interrupt, run_config, topics_rows, write_jsonl

from sparsepeft.comparison import Compared, Comparison, compare, noise, speed
from sparsepeft.comparison.running import _check_output
from sparsepeft.comparison.speed import Repeats, _medians
from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED, locked
from sparsepeft.runs.history import read_history
from sparsepeft.training import RunConfig, evaluate
from sparsepeft.training.fit import SafeTrainer

pytestmark = pytest.mark.slow


class Watch(Recorder):
    """Interrupts a run after a step, if one is named."""

    def __init__(self, interrupted: str = "") -> None:
        super().__init__()
        self.interrupted = interrupted

    def callbacks(self, run: str) -> Sequence[Any]:
        return [Interrupt(7)] if run == self.interrupted else []


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "RESAMPLES", 50)
    for name in ("ONE_TEXT", "A_BATCH"):
        monkeypatch.setattr(speed, name, Repeats(2, 2, seconds=0))


def own_file(folder: Path, count: int = 80) -> Path:
    rows = topics_rows("train")[:count]
    return write_jsonl(folder / "mine.jsonl", [{"text": row["text"], "label": row["label"]} for row in rows])


def own_config(backbone: Path, folder: Path, **changes: Any) -> RunConfig:
    values = {"task": "custom", "train_file": str(folder / "mine.jsonl")}
    return run_config(backbone, folder / "out", **values, **changes)


def by_name(comparison: Comparison) -> dict[str, Compared]:
    return {method.method: method for method in comparison.methods}


@pytest.fixture(scope="module")
def whole(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("comparison")
    return folder, compare(run_config(tiny_backbone, folder / "out"), ["head", "spartan", "lora", "full"])


def test_rows_are_what_the_runs_say(whole: tuple[Path, Comparison], tiny_backbone: Path) -> None:
    folder, comparison = whole
    assert (comparison.metric, comparison.num_rows["validation"], comparison.num_rows["test"]) == ("accuracy", 60, 120)
    backbone_bytes = (tiny_backbone / "model.safetensors").stat().st_size
    for name, method in by_name(comparison).items():
        run = folder / "out" / f"{name}-42"
        results = json.loads((run / "results.json").read_text())
        assert method.score == pytest.approx(results["metrics"]["validation"]["accuracy"])
        assert method.test_score == pytest.approx(results["score"])
        assert method.interval is not None
        assert method.interval[0] < method.score < method.interval[1]
        assert method.file_bytes == sum(file.stat().st_size for file in run.glob("*.safetensors"))
        config = "config.json" if name == "full" else "adapter_config.json"
        assert method.task_bytes >= method.file_bytes + (run / config).stat().st_size
        assert (method.task_bytes > backbone_bytes) == (name == "full")
        assert (method.shared_bytes == 0) == (name == "full")
        assert method.train_seconds == pytest.approx(results["train_seconds"], abs=0.2)
        assert method.latency_ms > 0
        assert method.texts_per_second > 0
    standings = [method.standing for method in comparison.methods]
    assert standings.count("best") == 1
    best = by_name(comparison)[comparison.methods[standings.index("best")].method]
    assert best.score == max(method.score for method in comparison.methods)
    assert comparison.baseline["score"] == pytest.approx(0.2, abs=0.05)  # of five topics
    assert str(folder) not in json.dumps(comparison.to_dict())
    assert all(file.is_file() for file in comparison.files)


def test_what_is_done_is_not_done_again(whole: tuple[Path, Comparison], tiny_backbone: Path) -> None:
    folder, comparison = whole
    config = run_config(tiny_backbone, folder / "out")
    with pytest.raises(UserError, match=r"finished run with other values of max_steps; .*`overwrite`"):
        compare(run_config(tiny_backbone, folder / "out", max_steps=3), ["head"])
    recorder = Recorder()
    again = compare(config, ["lora", "head"], watcher=recorder)
    assert (recorder.here, recorder.there) == ([], ["lora-42", "head-42"])
    for name, method in by_name(again).items():
        assert (method.scores, method.train_seconds) == (
            by_name(comparison)[name].scores,
            by_name(comparison)[name].train_seconds,
        )
    with locked(folder / "out"), pytest.raises(UserError, match="Another process is writing to"):
        compare(config, ["head"])


def test_an_interrupted_comparison_goes_on_and_counts_all_seconds(tiny_backbone: Path, tmp_path: Path) -> None:
    own_file(tmp_path)
    config = own_config(tiny_backbone, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(config, ["head", "pfeiffer"], watcher=Watch("pfeiffer-42"))
    assert (tmp_path / "out" / "head-42" / "results.json").is_file()
    assert (tmp_path / "out" / "pfeiffer-42" / UNFINISHED).is_dir()
    with pytest.raises(UserError, match="holds an unfinished run with other values of max_steps"):
        compare(own_config(tiny_backbone, tmp_path, max_steps=3), ["pfeiffer"])
    recorder = Recorder()
    comparison = compare(config, ["head", "pfeiffer"], watcher=recorder)
    assert (recorder.here, recorder.there) == (["pfeiffer-42"], ["head-42"])
    seconds = read_history(tmp_path / "out" / "pfeiffer-42")[-1]["seconds"]
    assert by_name(comparison)["pfeiffer"].train_seconds >= seconds
    own_file(tmp_path, 60)
    with pytest.raises(UserError, match=r"other values of mine.jsonl \(its content\)"):
        compare(config, ["head"])
    recorder = Recorder()
    compare(config, ["head"], watcher=recorder, overwrite=True)
    assert recorder.here == ["head-42"]


def test_a_method_that_fails_is_a_row_and_tried_again(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path)
    config, original = own_config(tiny_backbone, tmp_path), SafeTrainer.compute_loss

    def diverge(self: SafeTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if "lora" in str(self.args.output_dir) else loss

    monkeypatch.setattr(SafeTrainer, "compute_loss", diverge)
    recorder = Recorder()
    comparison = compare(config, ["lora", "head"], watcher=recorder)
    assert recorder.here == ["head-42"]
    assert recorder.failures["lora-42"]["type"] == "Diverged"
    assert comparison.failed == ("lora",)
    lora, head = comparison.methods
    assert (lora.standing, lora.score) == ("failed", None)
    assert "The loss became nan at step 1" in lora.error
    assert head.standing == "best"
    with pytest.raises(RuntimeError, match="The loss became nan"):
        compare(config, ["lora"])
    monkeypatch.undo()
    assert not compare(config, ["lora", "head"]).failed
    weights = tmp_path / "out" / "head-42" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    broken = by_name(compare(config, ["lora", "head"]))["head"]
    assert "could not be loaded" in broken.error
    (tmp_path / "out" / "head-42" / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        compare(config, ["head"])
    assert not compare(config, ["head"], overwrite=True).failed


def test_pairs_values_and_seeds(tiny_backbone: Path, tmp_path: Path) -> None:
    texts = [row["text"] for row in topics_rows("train")]
    rows = [{"a": a, "b": b, "y": len(a) / 7} for a, b in zip(texts[:60], texts[60:120], strict=True)]
    train, held = (write_jsonl(tmp_path / f"{len(part)}.jsonl", part) for part in (rows[:40], rows[40:]))
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    own = {"task": "custom", "train_file": str(train), "validation_file": str(held)}
    config = run_config(tiny_backbone, tmp_path / "out", **own, **columns)
    comparison = compare(config, ["head", "full"], seeds=[1, 2])
    assert (comparison.metric, comparison.num_rows["validation"]) == ("pearson_spearman", 20)
    assert "bootstrap" in comparison.settings["interval"]
    assert comparison.baseline["score"] == 0.0
    head = by_name(comparison)["head"]
    found = [evaluate(tmp_path / "out" / f"head-{seed}")["validation"]["pearson_spearman"] for seed in (1, 2)]
    assert head.scores == pytest.approx(found)
    assert head.score == pytest.approx(np.mean(found))
    assert "seeds 1, 2" in (tmp_path / "out" / "comparison.md").read_text()


def test_several_labels(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "label": [row["label"], *(["long"] if len(row["text"]) > 80 else [])]}
        for row in topics_rows("train")[:80]
    ]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    comparison = compare(own_config(tiny_backbone, tmp_path), ["head", "spartan"])
    assert comparison.metric == "micro_f1"
    assert isinstance(comparison.baseline["answer"], list)
    for name, method in by_name(comparison).items():  # by the run's own thresholds
        results = json.loads((tmp_path / "out" / f"{name}-42" / "results.json").read_text())
        assert method.score == pytest.approx(results["metrics"]["validation"]["micro_f1"])


def test_what_cannot_be_used_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    own_file(tmp_path)
    config = own_config(tiny_backbone, tmp_path)
    for changes, words in (
        ({"score_on": "selection"}, "methods are compared on validation"),
        ({"max_length": 999}, "at most 64 tokens"),
        ({"device": "abacus"}, "`device=abacus` was given"),
        ({"class_weights": "x=2"}, "the label 'x' is unknown"),
    ):
        with pytest.raises(UserError, match=words):
            compare(own_config(tiny_backbone, tmp_path, **changes))
    assert not (tmp_path / "out").exists()
    sentences = [{"tokens": ["Anna", "sleeps", "here"], "tags": ["B-PER", "O", "O"]} for _ in range(20)]
    own = {"train_file": str(write_jsonl(tmp_path / "tokens.jsonl", sentences))}
    with pytest.raises(UserError, match="labels tokens, but methods are compared on labels of whole texts"):
        compare(run_config(tiny_backbone, tmp_path / "out", task="custom", **own))
    with pytest.raises(UserError, match="methods are compared on labelled texts"):
        compare(RunConfig("lm", str(tmp_path / "out"), model="m", text=("a.txt",)))
    (tmp_path / "out").mkdir()
    for name in ("mine.txt", "comparison.json"):
        (tmp_path / "out" / name).write_text("[1]")
        with pytest.raises(UserError, match=rf"holds other files \({name}"):
            compare(config, ["head"])
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "head-7").mkdir()  # a run of another seed, without a result
    _check_output(tmp_path / "out")


def test_calls_take_turns() -> None:
    order: list[str] = []
    found = _medians({name: lambda name=name: order.append(name) for name in "abc"}, Repeats(2, 4, seconds=0))
    assert "".join(order) == "abc" + "abc" + "bca"
    assert all(seconds >= 0 for seconds in found.values())


def test_the_bundled_model(tmp_path: Path) -> None:
    own_file(tmp_path)
    config = RunConfig("custom", str(tmp_path / "out"), train_file=str(tmp_path / "mine.jsonl"), max_steps=1)
    comparison = compare(config, ["head", "spartan", "full"])
    head, spartan, full = comparison.methods
    assert head.task_bytes < spartan.task_bytes < spartan.shared_bytes < full.task_bytes
    assert "all-MiniLM-L6-v2" in comparison.settings["model"]
