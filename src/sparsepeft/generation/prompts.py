"""Prompts in a file or a stream: one a line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.rows.reading import read_text


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, as :func:`parse_prompts` reads them.

    Raises:
        UserError: it is no file, cannot be read, or has a line without a prompt.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{file} {what}; pass a file with a prompt a line as `file`.")
    return list(parse_prompts(read_text(file), str(file)))


def parse_prompts(text: str, source: str) -> Iterator[str]:
    """The prompt of each line: the line, or what a JSON object on it has under ``"prompt"``.

    A line that merely begins like JSON is text.

    Args:
        text: the lines.
        source: what they come from, for errors.

    Raises:
        UserError: there is no line, one is empty, or a JSON object has no prompt.
    """
    if not text:
        raise UserError(f"There is no prompt in {source}; give one a line.")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            raise UserError(
                f'{source}, line {number} is empty; take it out, or write {{"prompt": ""}} for an empty prompt.'
            )
        value: Any = line
        if line[:1] == "{":
            with contextlib.suppress(ValueError):
                value = json.loads(line)
        if isinstance(value, dict):
            value = value.get("prompt")
        if not isinstance(value, str):
            raise UserError(f'{source}, line {number}: the JSON object has no text under "prompt"; correct that line.')
        yield value
