"""``sparsepeft predict``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli import bulk
from sparsepeft_cli.terminal import options


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train`.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; without it, inputs are read from --file or stdin.")
    ] = None,
    text_pair: Annotated[
        str | None, typer.Argument(metavar="TEXT_PAIR", help="The second text, for tasks about pairs.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV, JSONL, parquet or CoNLL with the columns of training, or one input a line: plain text (a "
            'tab between pairs), or JSON: "a", ["a", "b"], {...}. Also with .gz.'
        ),
    ] = None,
    output: Annotated[
        Path | None,
        options.output(
            "Write the answers to this file, whole or not at all; with --input to this folder. [default: stdout]"
        ),
    ] = None,
    output_format: Annotated[
        str | None, typer.Option(help="jsonl or csv. [default: by the ending of --output, else jsonl]")
    ] = None,
    model: options.TrainedModel = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Inputs per forward pass. [default: 32]")] = None,
    device: options.Device = None,
    infer: options.Infer = None,
    **more: Any,
) -> None:
    """Label texts, or find entities in them: a row out for each input, in order and as soon as it can be given.

    Columns of the input come before the answer (`label`, `score`, `scores`, or `entities`); where one of them has the
    same name, the answer's is `predicted_label`. An input that cannot be answered has an `error` instead, and the exit
    code is 1.

    With --input many rows are answered, file by file, by one task or by several in one pass. The same command goes on
    after an interruption.

    Example: `sparsepeft predict out/topics "The striker scored twice in the second half."`

    Example: `sparsepeft predict out/mine --file new.csv --output answers.csv`

    Example: `sparsepeft predict --task mood=out/mood --task topic=out/topic --input 'texts/*.parquet' --output answers`
    """
    from sparsepeft.errors import RunFailed, UserError

    rows, many = ({name: more[name] for name in names} for names in (_ROWS, bulk.OPTIONS))
    if many["input"]:
        alone = {"text": text, "file": file, "output_format": output_format, "batch_size": batch_size, "infer": infer}
        if given := [name for name, value in alone.items() if value is not None]:
            raise UserError(f"`{given[0]}` does not go with --input; pass one of them.")
        return bulk.score(folder, output, rows, many, model=model, device=device)
    bulk.check_goes_with_input(many)
    if folder is None:
        raise UserError("Pass the FOLDER of a run, and a text, --file or lines on standard input; or --input.")
    if text is not None and file is not None:
        raise UserError("A text and --file were both given; pass one of them.")
    unused = rows if text is not None else ["delimiter"] if file is None else []
    if given := [name for name in unused if rows[name] is not None]:
        raise UserError(f"`{given[0]}` was given without a file; pass --file, or leave it out.")
    if file is not None and not file.is_file() and not file.is_fifo():
        raise UserError(f"The file {file} does not exist; pass an existing file to --file.")
    if output is not None and (output.is_dir() or (file is not None and output.resolve() == file.resolve())):
        raise UserError(f"--output {output} is {'a folder' if output.is_dir() else 'the input'}; pass another file.")
    from sparsepeft.scoring.answers import AnswerLines, answer, format_of

    format = format_of(output_format, output)
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.scoring.questions import Question
    from sparsepeft.training import Predictor, TableOptions, read_lines, read_questions

    keep_freed_memory()
    predictor = Predictor(folder, model, 32 if batch_size is None else batch_size, device, infer)
    table = TableOptions(**rows)
    if text is not None:
        texts = text if text_pair is None else [text, text_pair]
        predictor.check(texts)
        questions: Any = [Question(texts)]
    elif file is not None:
        questions = read_questions(file, predictor, table)
    else:
        questions = read_lines(_stdin(rows["encoding"]), predictor, table)
    num_answers = num_failed = num_cut = 0
    with _writing(output) as write:
        line_of = AnswerLines(format, predictor.spec)
        for batch in answer(predictor, questions):
            write("".join(map(line_of, batch)))
            num_answers += len(batch)
            num_failed += sum(one.prediction.error is not None for one in batch)
            num_cut += sum(one.prediction.truncated for one in batch)
        write(line_of.end())
    if num_cut:
        print(f"note: {num_cut:,} of {num_answers:,} inputs are longer than training's and were cut.", file=sys.stderr)
    if num_failed:
        raise RunFailed(
            f"{num_failed:,} of {num_answers:,} inputs could not be answered; the error in their rows says why."
        )


_ROWS = {name: each for name, each in options.ROWS.items() if name != "label_column"}
options.declare(
    command, options.section("Rows of a file", _ROWS) | options.section("Many files: --input", bulk.OPTIONS)
)


def _stdin(encoding: str | None) -> Any:
    """Lines of standard input; what is no text in that encoding is found where the line is read."""
    try:
        descriptor = sys.stdin.fileno()
    except (io.UnsupportedOperation, AttributeError):  # replaced by something of Python's own
        return sys.stdin
    if sys.stdin.isatty():
        print("Reading a text from each line; end with Ctrl-D.", file=sys.stderr)
    # Of its own: a thread may still be reading when the program ends, and would hold up the closing of sys.stdin.
    try:
        return open(descriptor, encoding=encoding or "utf-8-sig", errors="surrogateescape", newline="\n", closefd=False)
    except LookupError as error:
        from sparsepeft.errors import UserError

        raise UserError(f"--encoding {encoding} is no encoding that Python knows; pass one such as utf-8.") from error


@contextmanager
def _writing(output: Path | None) -> Iterator[Callable[[str], object]]:
    """What takes text for a file, which is there when all of it was written, or for standard output, at once."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")

        def show(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        yield show
        return
    from sparsepeft.errors import RunFailed
    from sparsepeft.folders import writing

    try:
        with writing(output) as stream:
            yield lambda text: stream.write(text.encode())
    except OSError as error:
        raise RunFailed(f"{output} could not be written ({error}); free space, or pass another --output.") from error
