"""``sparsepeft predict``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Output folder of `sparsepeft train`.")],
    text: Annotated[
        str | None, typer.Argument(help="The text; without it, lines are read from --file or stdin.")
    ] = None,
    text_pair: Annotated[str | None, typer.Argument(help="The second text, for tasks about pairs.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='One input a line: plain text (a tab between pairs), or JSON: "a", ["a", "b"], {...}.'),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, if it has moved since training.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs per forward pass.")] = 32,
) -> None:
    """Label texts: one JSON line out per input.

    Example: `sparsepeft predict out/topics "The striker scored twice in the second half."`
    """
    from sparsepeft.errors import UserError

    if text is not None and file is not None:
        raise UserError("A text and --file were both given; pass one of them.")
    if file is not None and not file.is_file():
        raise UserError(f"The file {file} does not exist; pass an existing file to --file.")
    from sparsepeft.allocator import keep_freed_memory
    from sparsepeft.training import Predictor

    keep_freed_memory()
    predictor = Predictor(folder, model, batch_size)
    columns = predictor.spec.text_columns
    inputs: Iterable[str | tuple[str, str]]
    if text is not None:
        inputs = [(text, text_pair)] if text_pair is not None else [text]
    else:
        source = file.open(encoding="utf-8") if file is not None else sys.stdin
        inputs = _parse(source, columns, str(file) if file is not None else "standard input")
    for prediction in predictor.predict_stream(inputs):
        line = {"label": prediction.label, "score": prediction.score, "scores": prediction.scores}
        if prediction.label is None:
            line = {"score": prediction.score}
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _parse(lines: Iterable[str], columns: tuple[str, ...], source: str) -> Iterator[str | tuple[str, str]]:
    """Inputs from lines; every line counts, so that line N of the output belongs to line N of the input."""
    from sparsepeft.errors import UserError

    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        value: object = line.split("\t") if len(columns) == 2 else line
        if line[:1] in ("{", "[", '"'):
            with contextlib.suppress(ValueError):  # a text that merely begins like JSON
                value = json.loads(line)
        if isinstance(value, dict):
            value = [value.get(name) for name in columns]
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list) or len(parts) != len(columns) or not all(isinstance(p, str) for p in parts):
            wanted = "a text" if len(columns) == 1 else "two texts (JSON list, or a tab between them)"
            raise UserError(f"{source}, line {number}: this task takes {wanted} per line; correct that line.")
        yield parts[0] if len(parts) == 1 else (parts[0], parts[1])
