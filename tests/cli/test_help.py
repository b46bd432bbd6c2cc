"""Help of every command: at 80 columns, whole, and without loading anything heavy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from tests.cli.test_cli import ran, sparsepeft

import sparsepeft_cli.app


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
