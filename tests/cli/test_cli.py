"""The command line as a person meets it: output, exit codes, one sentence for what went wrong."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import warnings
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


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "topics"
    done = sparsepeft(
        "train", "--task", "topics", "--model", tiny_backbone, "--output-dir", folder, "--max-steps", 8, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "topics"
    return folder


@pytest.mark.slow
def test_own_file(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = ["review,mood"] + [f"review number {i} was {w},{w}" for i in range(20) for w in ("good", "bad")]
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")
    done = sparsepeft(
        *("train", "--task", "custom", "--train-file", tmp_path / "mine.csv", "--text-column", "review"),
        *("--label-column", "mood", "--model", tiny_backbone, "--output-dir", tmp_path / "out", "--max-steps", 3),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["task"]["label_names"] == ["bad", "good"]
    assert "sparsepeft predict" in done.stdout


@pytest.mark.slow
def test_config_file_and_settings(tiny_backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"task: topics\nmodel: {tiny_backbone}\nmax_steps: 1\nsettings: {{num_parents: 4, top_k: 2}}\n")
    done = sparsepeft("train", "--config", file, "--output-dir", tmp_path / "o", "--set", "top_k=3", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (config["num_parents"], config["top_k"]) == (4, 3)


WRONG_FROM_THE_START = [
    (["--task", "sst3"], "did you mean 'sst2'"),
    (["--task", "topics", "--method", "spartn"], "did you mean 'spartan'"),
    (["--config", "{tmp}/run.yaml"], "did you mean 'best'"),
    (["--task", "custom", "--train-file", "{tmp}/none.csv"], "none.csv was given, but there is no such file"),
    (["--task", "topics", "--output-dir", "{tmp}"], "holds other files (run.yaml)"),
]


def test_what_is_wrong_from_the_start_costs_no_waiting(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: topics\nrecipe: bst\n")
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


def _bad_files(folder: Path) -> None:
    (folder / "empty.csv").write_text("")
    (folder / "fields.tsv").write_text("text\tlabel\none\ta\ntwo\tb\tc\n")
    (folder / "train.csv").write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(20)))
    (folder / "unseen.csv").write_text("text,label\nt,z\n")


BAD = {
    "unknown task": (["--task", "sst3"], ["sst3", "did you mean 'sst2'", "mnli"]),
    "unknown method": (["--task", "topics", "--method", "spartn"], ["spartn", "did you mean 'spartan'"]),
    "unknown setting": (["--task", "topics", "--set", "num_parent=3"], ["num_parent", "did you mean 'num_parents'"]),
    "malformed setting": (["--task", "topics", "--set", "top_k"], ["key=value"]),
    "top_k above num_parents": (["--task", "topics", "--set", "top_k=17"], ["top_k=17", "num_parents=16"]),
    "non-positive size": (["--task", "topics", "--set", "num_children=0"], ["num_children=0", "at least 1"]),
    "no data folder": (["--task", "sst2", "--data-dir", "{tmp}/none"], ["none", "does not exist"]),
    "missing file": (["--task", "custom", "--train-file", "{tmp}/none.csv"], ["none.csv"]),
    "empty file": (["--task", "custom", "--train-file", "{tmp}/empty.csv"], ["empty.csv", "empty"]),
    "wrong number of fields": (["--task", "custom", "--train-file", "{tmp}/fields.tsv"], ["fields.tsv:3", "2", "3"]),
    "unseen label": (
        ["--task", "custom", "--train-file", "{tmp}/train.csv", "--validation-file", "{tmp}/unseen.csv"],
        ["'z'", "train"],
    ),
    "no such model": (["--task", "topics", "--model", "{tmp}"], ["config.json"]),
    "model not on the hub": (["--task", "topics", "--model", "nobody/nothing"], ["nobody/nothing", "--model"]),
    "no task": ([], ["--task"]),
    "config file": (["--task", "topics", "--config", "{tmp}/none.yaml"], ["none.yaml", "does not exist"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_one_sentence(case: str, tmp_path: Path) -> None:
    _bad_files(tmp_path)
    arguments, words = BAD[case]
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    done = sparsepeft("train", *given, "--output-dir", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsepeft_cli", "train", "--task", "sst3", "--output-dir", str(tmp_path)]
    ended = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.slow
def test_failures_of_the_other_commands(trained: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("evaluate", tmp_path), ["run.json is missing"]),
        (("predict", tmp_path, "text"), ["run.json is missing"]),
        (("predict", trained, "one", "two"), ["takes 1 text"]),
        (("predict", trained, "--file", tmp_path / "none"), ["does not exist"]),
        (("train", "--task", "topics", "--output-dir", trained), ["already holds a finished run", "--overwrite"]),
        (("storage", "--model", "nobody/nothing"), ["nobody/nothing"]),
        (("storage", "--methods", "spartn"), ["did you mean 'spartan'"]),
    ):
        done = sparsepeft(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    done = sparsepeft("storage", "--num-tasks", 0)
    assert done.returncode == 2
    done = sparsepeft("predict", trained, stdin='["a", "b"]\n')
    assert done.returncode == 1
    assert "takes 1 text" in json.loads(done.stdout)["error"]


@pytest.mark.slow
def test_storage() -> None:
    done = sparsepeft("storage", "--model", "roberta-base", "--num-tasks", 9)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.slow
def test_damaged_and_misplaced_memories_end_with_2(trained: Path, tmp_path: Path) -> None:
    from tests.tiny import save_tiny_backbone

    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    other = save_tiny_backbone(tmp_path / "other", seed=3)
    for arguments, words in (
        (("predict", damaged, "text"), ["damaged", "could not be loaded"]),
        (("predict", trained, "text", "--model", other), ["other values", "check_backbone=False"]),
    ):
        done = sparsepeft(*arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words), done.stderr
