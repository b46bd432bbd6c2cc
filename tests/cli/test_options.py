"""Options that commands share, and names they had before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from tests.cli.test_help import COMMANDS
from tests.fixtures.test_before import BEFORE

from sparsepeft.errors import UserError
from sparsepeft_cli.terminal.options import current_names, several, short_dtype, whole_numbers

OLD = [
    ("storage", ["--method", "lora"], ["--methods", "lora"]),
    ("storage", ["--method=lora", "--method=full"], ["--methods=lora", "--methods=full"]),
    ("storage", ["--tasks", "3"], ["--num-tasks", "3"]),
    ("storage", ["--head", "linear"], ["--head-type", "linear"]),
    ("benchmark inference", ["--device", "raspberry-pi-4"], ["--emulate", "raspberry-pi-4"]),
    ("benchmark inference", ["--device=iphone-11"], ["--emulate=iphone-11"]),
    ("benchmark inference", ["--max-inputs", "8"], ["--max-examples", "8"]),
]


@pytest.mark.parametrize(("command", "given", "current"), OLD)
def test_old_names_work_and_say_the_new_one(
    command: str, given: list[str], current: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = COMMANDS[tuple(command.split())]
    assert current_names(found.callback, given) == current
    said = capsys.readouterr().err.splitlines()
    assert len(said) == sum(part.startswith("-") for part in given)
    old, new = given[0].partition("=")[0], current[0].partition("=")[0]
    assert said[0].startswith(f"{old} is now {new}")
    assert {option for parameter in found.params for option in parameter.opts} >= {new}
    found.make_context(command, [*given])  # its parser takes them


def test_every_former_command_has_its_options() -> None:
    former = json.loads((BEFORE / "options.json").read_text(encoding="utf-8"))
    for names, options in former.items():
        taken = {option for parameter in COMMANDS[tuple(names.split())].params for option in parameter.opts}
        assert taken >= set(options), names


@pytest.mark.parametrize(
    "given", [["--device", "cpu"], ["--", "--device", "iphone-11"], ["--output", "x"], ["--device"]]
)
def test_present_names_are_left_alone(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert current_names(COMMANDS["benchmark", "inference"].callback, given) == given
    assert capsys.readouterr().err == ""


def test_lists() -> None:
    assert several(["a,b", " c ,", "a"]) == ["a", "b", "c"]
    assert several(None) == []
    assert whole_numbers("--seeds", ["42,43", "44"]) == [42, 43, 44]
    with pytest.raises(UserError, match=r"--seeds x was given.*--seeds 42,43"):
        whole_numbers("--seeds", ["1,x"])


def test_dtypes_have_short_names() -> None:
    assert [short_dtype(name) for name in ("float32", "onnx-bfloat16", "fp16", "int8")] == [
        *("fp32", "onnx-bf16", "fp16", "int8")
    ]


SAME = ("--data-dir", "--device", "--json", "--seed", "--output", "--overwrite", "--max-examples")


@pytest.mark.parametrize("option", SAME)
def test_an_option_takes_the_same_in_every_command(option: str) -> None:
    kinds: dict[Any, list[str]] = {}
    for names, command in COMMANDS.items():
        for parameter in command.params:
            if option in parameter.opts:
                kinds.setdefault((parameter.is_flag, parameter.multiple), []).append(" ".join(names))
    assert len(kinds) == 1, kinds


def test_every_command_is_one_whose_errors_name_options() -> None:
    from sparsepeft_cli.terminal.errors import Command

    assert all(isinstance(command, (Command, typer.core.TyperGroup)) for command in COMMANDS.values())
