"""``sparsepeft data``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options
from sparsepeft_cli.train import OPTIONS

_MOST_LABELS = 20


_OF_FILES = (
    *("data_dir", "validation_file", "test_file", "text_column", "text_pair_column", "label_column", "problem_type"),
    *("delimiter", "encoding"),
)


def command(
    train_file: Annotated[
        Path | None, typer.Argument(help="Your own CSV, TSV, JSONL, JSON, parquet or CoNLL.", metavar="FILE")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead of a file: a GLUE task, bbc-news, goemotions, wnut17 or topics.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokens are counted: hub id or folder. [default: the bundled MiniLM]")
    ] = None,
    json: options.Json = False,
    **files: Any,
) -> None:
    """Look at a data file, as `sparsepeft train` would read it, before training on it.

    Shows how the file was read, which columns were taken, the labels, duplicates, lengths in tokens and a few rows.

    Example: `sparsepeft data tickets.csv --label-column category`
    """
    data_dir, files["train_file"] = files.pop("data_dir"), train_file
    from sparsepeft.errors import UserError
    from sparsepeft.tasks import check_task

    if (train_file is None) == (task is None):
        raise UserError("Pass either a file or --task with a task's name: one of the two.")
    check_task(task, data_dir, **files)
    from sparsepeft.training.early import preview
    from sparsepeft_cli.terminal.console import out, print_json
    from sparsepeft_cli.terminal.errors import in_options

    about = preview(task or "custom", model, data_dir=data_dir, **files)
    if json:
        print_json(about)
        return
    about["notes"] = [in_options(note) for note in about["notes"]]
    for part in _page(about):
        out.print(part, highlight=False)


options.declare(command, options.section("Options", {name: OPTIONS["Data"][name] for name in _OF_FILES}))


def _page(about: dict[str, Any]) -> Iterator[Any]:
    for file in about.get("files", {}).values():
        yield _cut(", ".join(file.values()))
    if columns := about.get("columns"):
        labels = [columns["label"]] if isinstance(columns["label"], str) else columns["label"]
        unused = [name for name in columns["found"] if name not in (*columns["text"], *labels)]
        yield _cut(
            f"text: {' + '.join(columns['text'])}; label: {', '.join(labels)}"
            + (f"; not used: {', '.join(name or '(unnamed)' for name in unused)}" if unused else "")
        )
    yield _cut(f"{about['task']}, {about['problem_type']}; scored by {', '.join(about['metrics'])}")
    yield from ("", _labels(about["parts"]), "")
    yield from map(_findings, about["parts"], about["parts"].values())
    yield from _lengths(about["tokens"], about["problem_type"] == "token_classification")
    yield ""
    for example in about["parts"]["train"]["examples"]:
        label = example["label"]
        yield _cut(f"[{', '.join(label) if isinstance(label, list) else label}] {' | '.join(example['texts'])}")
    yield ""
    yield from (f"note: {note}" for note in about["notes"])


def _labels(parts: dict[str, Any]) -> Any:
    from sparsepeft_cli.terminal.console import table

    rows = {name: part["rows"] for name, part in parts.items()}
    labels = {name: part["labels"] for name, part in parts.items()}
    if "quartiles" in labels["train"]:
        values = [
            [name, rows[name], each["least"], *each["quartiles"], each["greatest"]] for name, each in labels.items()
        ]
        return table("", ["values", "rows", "least", "25 %", "median", "75 %", "greatest"], values)
    order = sorted(labels["train"], key=lambda label: -labels["train"][label])
    shown = [[_cut(label, 30), *(each[label] for each in labels.values())] for label in order[:_MOST_LABELS]]
    if rest := order[_MOST_LABELS:]:
        shown.append([f"{len(rest):,} more", *(sum(each[label] for label in rest) for each in labels.values())])
    return table("", ["label", *parts], [*shown, ["(all rows)", *rows.values()]])


def _findings(name: str, part: dict[str, Any]) -> str:
    counts = {
        "duplicate texts": part["duplicates"],
        "duplicates with another label": part["contradictions"],
        "empty texts": part["empty_texts"],
        "texts that are also trained on": part.get("seen_in_train", 0),
    }
    said = ", ".join(f"{what} {count:,}" for what, count in counts.items() if count)
    return f"{name}: {said or 'no duplicates, no empty texts'}"


def _lengths(tokens: dict[str, Any], of_tokens: bool) -> Iterator[str]:
    does, doing = ("reads sentences in parts of", "splits") if of_tokens else ("cuts texts to", "cuts")
    yield (
        f"tokens ({tokens['model']}): median {tokens['median']:,}, 95 % {tokens['p95']:,}, "
        f"longest {tokens['longest']:,}"
    )
    yield (
        f"training {does} {tokens['limit']} tokens; {_percent(tokens['over_limit'])} are longer; "
        f"suggested: --max-length {tokens['suggested']}, which {doing} {_percent(tokens['over_suggested'])}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cut(text: str, width: int = 155) -> str:
    """Two lines of a narrow terminal at most."""
    return shorten(text, width, placeholder=" ...") if len(text) > width else text
