"""Help of every command: at 80 columns, whole, and without loading anything heavy; tables at widths of terminals."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from rich.console import Console
from tests.cli.test_cli import ran, sparsepeft

import sparsepeft_cli.app
from sparsepeft_cli.terminal import console
from sparsepeft_cli.terminal.console import table


def _commands(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*names, name))


COMMANDS = dict(_commands(typer.main.get_command(sparsepeft_cli.app.app)))


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_cuts_nothing(names: tuple[str, ...]) -> None:
    done = ran(*names, "--help", columns=80)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    assert not re.search(r"^  \[?[A-Z_]+\]?( +\[required\])?$", done.stdout, re.MULTILINE), "an argument without a word"
    words = done.stdout.split()
    for parameter in COMMANDS[names].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert max(parameter.opts, key=len) in words
            assert not parameter.required or "[required]" in words
    for below in getattr(COMMANDS[names], "commands", {}).values():
        assert " ".join(below.help.split("\n\n")[0].split()) in " ".join(words)
    if not hasattr(COMMANDS[names], "commands"):
        assert "Example" in done.stdout
        assert f"sparsepeft {' '.join(names)}" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, typer, sparsepeft_cli.app\n"
    code += f"for names in {list(COMMANDS)}:\n"
    code += "    try: sparsepeft_cli.app.app([*names, '--help'], standalone_mode=False)\n    except SystemExit: pass\n"
    code += "try: sparsepeft_cli.app.app(['--version'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'peft', 'transformers', 'matplotlib', 'onnx', 'numpy'}\n"
    code += "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS)
    assert "peft" in done.stdout.splitlines()[-1]


def test_an_example_goes_on_after_a_backslash() -> None:
    lines = sparsepeft("benchmark", "spt", "--help", columns=60).stdout.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.endswith("\\")]
    assert lines[first].startswith("  sparsepeft benchmark spt --model opt-1024")
    assert lines[first + 1].strip().startswith("--")


FIGURES = [[f"{row}.{column}e-07" for column in range(6)] for row in range(4)]
ROWS = [[f"task number {row}, [x]", *figures] for row, figures in enumerate(FIGURES)]
COLUMNS = ["task", "texts", "deviation", "other labels", "adapter", "float32", "int8"]


@pytest.mark.parametrize(("width", "kind"), [(120, "wide"), (80, "blocks"), (60, "blocks"), (20, "blocks")])
def test_no_figure_is_cut(width: int, kind: str) -> None:
    printed = _printed(COLUMNS, ROWS, width)
    assert ("┃" in printed) == (kind == "wide")
    for row in ROWS:
        assert all(cell in printed for cell in row[1:])
    assert "…" not in printed
    assert all(cell_len(line) <= max(width, 23) for line in printed.splitlines())


def test_few_rows_become_columns() -> None:
    printed = _printed(COLUMNS, ROWS[:2], 60)
    assert [line for line in printed.splitlines() if "other labels" in line and "0.2e-07" in line and "1.2e-07" in line]
    assert "task number 1, [x]" in printed


def test_square_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for stream in (console.out, console.err):
        with stream.status("reading out/[v1]/x"):
            stream.print("“[deleted]” [/quote]", highlight=False)
    shown = console._Shown("out/[v1]", console=Console(file=io.StringIO(), force_terminal=True))
    shown.update("out/[/v2]")
    assert str(shown.renderable.text) == "out/[/v2]"
    out, err = capsys.readouterr()
    assert ("“[deleted]” [/quote]" in out, "“[deleted]” [/quote]" in err, "[v1]" in err) == (True, True, True)


def test_a_table_without_rows_has_its_header() -> None:
    assert "deviation" in _printed(COLUMNS, [], 120)


def _printed(columns: list[str], rows: list[list[str]], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table("a title", columns, rows), soft_wrap=True)
    console.print(table("", columns, rows))
    return console.file.getvalue()  # type: ignore[attr-defined]
