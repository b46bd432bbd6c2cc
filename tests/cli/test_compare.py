"""``sparsepeft compare`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused, sparsepeft
from tests.cli.tickets import write_tickets

from sparsepeft.training.fit import SafeTrainer


@pytest.mark.slow
def test_a_file_from_command_to_recommendation(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_tickets(tmp_path / "tickets.csv", 80, delimiter=";")
    command = ("compare", "--train-file", file, "--model", tiny_backbone, "--max-steps", 4, "--methods", "head,full")
    done = ran(*command)
    heading = "tickets: accuracy on 8 validation rows, seed 42"
    for words in (heading, "always billing", "note: 95 %: Wilson", "written: "):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith(("Take ", "None can be recommended"))
    assert "2/2  full-42" in done.stderr
    assert (tmp_path / "out" / "compare-tickets" / "comparison.md").is_file()

    again = ran(*command, "--json")
    assert "2/2" not in again.stderr  # nothing was trained
    found = json.loads(again.stdout)
    assert found == json.loads((tmp_path / "out" / "compare-tickets" / "comparison.json").read_text())
    refused(*command, "--max-steps", 5, words=("other values of max_steps", "--output-dir", "--overwrite"))
    ran(*command, "--max-steps", 5, "--overwrite")

    original = SafeTrainer.compute_loss
    monkeypatch.setattr(SafeTrainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))
    done = sparsepeft(*command, "--max-steps", 5, "--methods", "lora,head")
    assert done.returncode == 1
    assert "note: lora failed: The loss became nan" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("Error: 1 of 3 methods failed: lora.")


def test_what_is_wrong_from_the_start(tmp_path: Path) -> None:
    file = write_tickets(tmp_path / "tickets.csv", 20)
    for *arguments, words in (
        ("--task", "lm", "--task lm was given, but methods are compared on labelled texts"),
        ("--task", "tpics", "did you mean 'topics'"),
        ("--methods", "spartn", "--train-file", file, "--methods: 'spartn' is unknown"),
        ("Pass your own file as --train-file, or --task",),
        ("--train-file", tmp_path / "none.csv", "there is no such file"),
        ("--train-file", file, "--task", "topics", "--train-file came with the task 'topics'"),
        ("--train-file", file, "--text-column", "body", "--text-column body was given"),
        ("--train-file", file, "--seeds", "x", "--seeds x was given"),
    ):
        refused("compare", *arguments, words=words)
