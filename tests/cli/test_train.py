"""``sparsepeft train`` and ``sparsepeft push`` as they are used: options, summary, dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tests.cli.test_cli import ran, sparsepeft
from tests.tiny import topics_rows, topics_text, write_jsonl
from transformers.integrations import integration_utils

from sparsepeft.reprs import duration
from sparsepeft.runs import pushing
from sparsepeft_cli.terminal.summary import summary

RESULTS = {
    "task": "mails",
    "method": "spartan",
    "score_split": "validation",
    "main_metric": "accuracy",
    "score": 0.9,
    "metrics": {"validation": {"accuracy": 0.9, "macro_f1": 0.85}},
    "num_rows": {"training": 1800, "selection": 200, "validation": 250},
    "steps": 120,
    "best_step": 96,
    "train_seconds": 200.0,
    "parameters": {"trained": 5000, "head": 770},
    "saved_bytes": 20000,
    "model_bytes": 91e6,
    "baseline": {"answer": "ham", "metrics": {"accuracy": 0.8, "macro_f1": 0.4}},
    "report": {
        "per_class": {name: dict.fromkeys(("precision", "recall", "f1", "support"), 1) for name in ("ham", "s" * 40)}
    },
    "num_texts": 1,
    "problem_type": "single_label_classification",
    "notes": ["mails: " + "a note that is longer than a line " * 3],
    "formula": "P(1+2C)dL = 123",
}
SCORES = dict.fromkeys(("precision", "recall", "f1", "support"), 1)
MEANS = {"answer": 2.5, "metrics": {"mae": 1.2, "rmse": 1.5}}


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        (
            {},
            ["1,800 to train on, 200 to choose", "most frequent label, ham, for all: accuracy 0.8000", "770 in the"],
            ["P("],
        ),
        ({"method": "full"}, ["all 5,000 parameters", "a copy of the model"], ["in the head"]),
        ({"num_texts": 2}, ['predict out "one text" "another text"'], []),
        (
            {"baseline": MEANS, "report": {"mae": 0.5}, "problem_type": "regression"},
            ["mae 0.5000", "mae 1.2000", "gives a value"],
            ["precision"],
        ),
        (
            {
                "baseline": {"answer": ["joy"], "metrics": {"accuracy": 0.1}},
                "problem_type": "multi_label_classification",
                "metrics_at_half": {"validation": {"accuracy": 0.8, "macro_f1": 0.65, "subset_accuracy": 0.5}},
            },
            ["all labels that hold", "most frequent of the labels, joy, for", "threshold: accuracy 0.8000, macro_f1 0"],
            [],
        ),
        (
            {"report": {"per_class": {f"c{i}": SCORES | {"f1": i / 13, "support": i} for i in range(13)}}},
            ["c1  ", "c5  ", "(the 5 labels with the lowest f1, of 13)"],
            ["c0", "c6"],
        ),
    ],
)
def test_a_summary_fits_the_run_and_the_terminal(changes: dict, words: list[str], absent: list[str]) -> None:
    lines = summary(RESULTS | changes, "out")
    assert max(map(len, lines[:-1])) <= 80  # the last is a command to copy
    assert all(word in "\n".join(lines) for word in words)
    assert not any(word in "\n".join(lines) for word in absent)


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (7, 600, 9000)] == ["7 s", "10 min", "2.5 h"]


@pytest.mark.slow
def test_options_by_transformers_names(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in topics_rows("train")[:100]]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    done = sparsepeft(
        *("train", "--train-file", file, "--model", tiny_backbone, "--output-dir", tmp_path / "o", "--max-steps", 6),
        *("--class-weights", "sport=3,health=0.5", "--eval-steps", 1, "--early-stopping-patience", 2),
        *("--weight-decay", 0.1, "--lr-scheduler-type", "cosine", "--warmup-ratio", 0, "--device", "cpu"),
        *("--learning-rate", "1e-9", "--gradient-accumulation-steps", 2, "--push-to-hub", "me/mine"),
    )
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["steps"] == 3
    found = results["hyperparameters"]
    assert (found["weight_decay"], found["lr_scheduler_type"], found["warmup_steps"]) == (0.1, "cosine", 0)
    assert (found["class_weights"]["sport"], found["class_weights"]["science"]) == (3.0, 1.0)
    assert done.returncode == 1
    assert "precision" in done.stdout
    assert f"it is kept: repeat `sparsepeft push {tmp_path / 'o'} me/mine`" in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pushing, "push_to_hub", lambda folder, repo_id, private: f"https://hub/{repo_id}")
        own = ("--train-file", file, "--model", tiny_backbone, "--output-dir", tmp_path / "j", "--max-steps", 1)
        pushed = ran("train", *own, "--json", "--push-to-hub", "me/mine")
        assert ran("push", tmp_path / "o", "me/mine").stdout == "https://hub/me/mine\n"
    assert json.loads(pushed.stdout)["steps"] == 1
    assert "https://hub/me/mine" in pushed.stderr
    again = sparsepeft("push", tmp_path / "o", "me/mine")
    assert (again.returncode, again.stderr.splitlines()[-1]) == (1, done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["topics", "lm"])
def test_a_dry_run_says_what_would_be_done(
    tiny_backbone: Path, tiny_language_model: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("--model", tiny_backbone)
    if task == "lm":
        own = ("--model", tiny_language_model, "--text", topics_text(tmp_path), "--block-length", 16)
    before = sorted(tmp_path.iterdir())
    told: list[str] = []

    class Tracker(hf.TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            told.append("a log")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    command = ("train", "--task", task, "--output-dir", tmp_path / "o", "--max-steps", 50, "--dry-run", *own)
    command += ("--report-to", "wandb")
    done = ran(*command)
    for words in ("50 steps of", "trained: ", "s a step", "Nothing was written"):
        assert words in done.stdout
    assert sorted(tmp_path.iterdir()) == before
    found = json.loads(sparsepeft(*command, "--json").stdout)
    assert found["plan"]["steps"] == 50
    assert found["saved_bytes"] > 0
    assert found["estimated_seconds"] > 50 * found["seconds_per_step"]
    assert not told
