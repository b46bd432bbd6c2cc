"""The library's words for parameters, in the command line's."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path

import pytest
import typer

import sparsepeft_cli.app
from sparsepeft.errors import RunFailed, UserError
from sparsepeft_cli.terminal.errors import in_options
from sparsepeft_cli.terminal.interrupts import Stop


@pytest.fixture(scope="module")
def parameters() -> list:
    return typer.main.get_command(sparsepeft_cli.app.app).commands["train"].params


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pass another `output_dir`.", "pass another --output-dir."),
        ("`learning_rate=nan` was given", "--learning-rate nan was given"),
        ("`compile=True` was given", "--compile was given"),
        ("run `sparsepeft train` or `load_sparse`", "run `sparsepeft train` or `load_sparse`"),
        ("the setting `num_parents=0`", "the setting `num_parents=0`"),
    ],
)
def test_parameters_become_options(text: str, shown: str, parameters: list) -> None:
    assert in_options(text, parameters) == shown


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("a\nb"), 1, "Error: KeyError: 'a\\nb' (not foreseen; --debug shows where)."),
        (RunFailed("The disk\n is full."), 1, "Error: The disk is full."),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.json"),
            1,
            "Error: a.json could not be written (No space left on device); free space, or write elsewhere.",
        ),
        (UserError("`output`=x"), 2, "Error: --output=x"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (Stop(signal.SIGTERM), 143, "Terminated."),
    ],
)
def test_every_end_is_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr("sparsepeft.runs.history.read_history", fail)
    monkeypatch.setattr(sys, "argv", ["sparsepeft", "history", "out"])
    with pytest.raises(SystemExit) as ended:
        sparsepeft_cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (code, f"{line}\n")
