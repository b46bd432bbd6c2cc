"""The library's words for parameters, in the command line's."""

from __future__ import annotations

import pytest
import typer

import sparsepeft_cli
from sparsepeft_cli._errors import in_options


@pytest.fixture(scope="module")
def parameters() -> list:
    return typer.main.get_command(sparsepeft_cli.app).commands["train"].params


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
