"""The command line as a person meets it: output, exit codes, one sentence for what went wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsepeft.storage import METHODS as STORAGE_METHODS
from sparsepeft_cli import main
from sparsepeft_cli.terminal import console as _console


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def sparsepeft(*arguments: object, stdin: str = "", columns: int = 200) -> Done:
    """Run the command line's entry point in this process, which has paid for the imports."""
    out, err = io.StringIO(), io.StringIO()
    variables = {"COLUMNS": str(columns), "SPARSEPEFT_DATA": ""}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("SPARSEPEFT_DATA")
        for console in (_console.out, _console.err):  # which may have been made for another width
            patch.setattr(console, "_width", columns)
        patch.setattr(sys, "argv", ["sparsepeft", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


# Commands that say what they are doing, before it is known that it cannot be done.
WITH_STATUS = {"export", "sparsify", "inspect", "benchmark", "evaluate", "reproduce"}


def ran(*arguments: object, stdin: str = "", columns: int = 200) -> Done:
    """Run a command that ends well."""
    done = sparsepeft(*arguments, stdin=stdin, columns=columns)
    assert done.returncode == 0, (arguments, done.stderr)
    return done


def refused(*arguments: object, words: str | Iterable[str], code: int = 2) -> str:
    """Run a command that ends with one sentence, which has these words."""
    done = sparsepeft(*arguments)
    assert done.returncode == code, (arguments, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Loading weights")]
    sentence = lines.pop()
    assert sentence.startswith("Error: ")
    assert not lines or arguments[0] in WITH_STATUS
    for word in [words] if isinstance(words, str) else words:
        assert word in sentence
    return sentence


@pytest.mark.slow
def test_own_file(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = ["review,mood"] + [f"review number {i} was {w},{w}" for i in range(20) for w in ("good", "bad")]
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")
    done = ran(
        *("train", "--task", "custom", "--train-file", tmp_path / "mine.csv", "--text-column", "review"),
        *("--label-column", "mood", "--model", tiny_backbone, "--output-dir", tmp_path / "out", "--max-steps", 3),
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["task"]["label_names"] == ["bad", "good"]
    assert "sparsepeft predict" in done.stdout


@pytest.mark.slow
def test_config_file_and_settings(tiny_backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"task: topics\nmodel: {tiny_backbone}\nmax_steps: 1\nsettings: {{num_parents: 4, top_k: 2}}\n")
    ran("train", "--config", file, "--output-dir", tmp_path / "o", "--set", "top_k=3", "--json")
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (config["num_parents"], config["top_k"]) == (4, 3)


WRONG_FROM_THE_START = [
    (["--task", "sst3"], "did you mean 'sst2'"),
    (["--task", "topics", "--method", "spartn"], "did you mean 'spartan'"),
    (["--config", "{tmp}/run.yaml"], "did you mean 'best'"),
    (["--task", "custom", "--train-file", "{tmp}/none.csv"], "none.csv was given, but there is no such file"),
    (["--task", "topics", "--output-dir", "{tmp}"], "holds other files"),
    (["--train-file", "{tmp}/mine.csv", "--text-column", "body"], "--text-column body was given, but the columns are"),
]


def test_what_is_wrong_from_the_start_costs_no_waiting(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: topics\nrecipe: bst\n")
    (tmp_path / "mine.csv").write_text("text,label\na,b\n")
    commands = [
        ["--output-dir", f"{tmp_path}/out", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)]
        for arguments, _ in WRONG_FROM_THE_START
    ]
    code = f"""
import sys
from sparsepeft_cli import main
for arguments in {commands}:
    sys.argv = ['sparsepeft', 'train', *arguments]
    try: main()
    except SystemExit as end: assert end.code == 2, end.code
sys.exit(9 if {{'torch', 'peft', 'transformers', 'datasets', 'numpy'}} & set(sys.modules) else 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for line, (_, words) in zip(ended.stderr.splitlines(), WRONG_FROM_THE_START, strict=True):
        assert words in line


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsepeft_cli", "train", "--task", "sst3", "--output-dir", str(tmp_path)]
    ended = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.slow
def test_storage() -> None:
    done = ran("storage", "--model", "roberta-base", "--num-tasks", 9)
    for figure in ("1,032,192", "1,179,648", "1,107.00 M", "133.62 M"):
        assert figure in done.stdout
    done = sparsepeft("storage", "--model", "roberta-base", "--json")
    assert [row["method"] for row in json.loads(done.stdout)["methods"]] == list(STORAGE_METHODS)


@pytest.mark.slow
def test_what_fails_while_running_ends_with_1(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsepeft.training.fit import SafeTrainer

    original = SafeTrainer.compute_loss
    monkeypatch.setattr(SafeTrainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))
    arguments = (
        "train",
        "--task",
        "topics",
        "--model",
        tiny_backbone,
        "--output-dir",
        tmp_path / "out",
        "--max-steps",
        3,
    )
    done = sparsepeft(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "The loss became nan at step 1" in done.stderr
    monkeypatch.undo()
    assert sparsepeft(*arguments).returncode == 0  # the same command goes on
