"""Options that several commands have, each defined once; old names of options."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Function = TypeVar("Function", bound=Callable[..., Any])

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG = re.compile(rf"\b({'|'.join(_SHORT)})\b")
_RENAMED = "renamed_options"


def several(values: Sequence[str] | None) -> list[str]:
    """``["a,b", "c"]`` -> ``["a", "b", "c"]``, each once: what an option holds that takes a,b or is repeated."""
    parts = [part.strip() for value in values or () for part in value.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def whole_numbers(option: str, values: Sequence[str] | None) -> list[int]:
    """The same for whole numbers of at least 0.

    Raises:
        UserError: one is something else.
    """
    from sparsepeft.errors import UserError

    texts = several(values)
    for text in texts:
        if not text.isdecimal():
            raise UserError(
                f"{option} {text} was given, but it takes whole numbers of at least 0; pass e.g. {option} 42,43."
            )
    return [int(text) for text in texts]


def short_dtype(text: str) -> str:
    """A text with this program's names of dtypes for PyTorch's: ``onnx-fp32`` for ``onnx-float32``."""
    return _LONG.sub(lambda found: _SHORT[found.group()], text)


def renamed(names: Mapping[str, str], *, values: Mapping[str, Sequence[str]] | None = None) -> Callable[..., Any]:
    """A decorator for a command whose options have other names now; the old ones work, with a line on stderr.

    Args:
        names: new names by old ones: ``{"--method": "--methods"}``.
        values: for an old name that means something else now, the values that still say what it meant.
    """

    def decorate(command: Function) -> Function:
        setattr(command, _RENAMED, (dict(names), dict(values or {})))
        return command

    return decorate


def current_names(command: Any, arguments: Sequence[str]) -> list[str]:
    """A command's arguments with the present names of its options; says on stderr which were old."""
    empty: tuple[dict[str, str], dict[str, Sequence[str]]] = ({}, {})
    names, values = getattr(command, _RENAMED, empty)
    current: list[str] = []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for index, argument in enumerate(arguments):
        old, equals, value = argument.partition("=")
        if index < end and old in names:
            given = value if equals else arguments[index + 1] if index + 1 < len(arguments) else ""
            if old not in values or given in values[old]:
                shown = f" for {given}" if old in values else ""
                print(f"{old} is now {names[old]}{shown}; the old name goes with the next release.", file=sys.stderr)
                argument = names[old] + equals + value
        current.append(argument)
    return current


def declare(command: Any, options: Mapping[str, tuple[Any, Any]]) -> None:
    """Give a command that takes ``**values`` more options: by parameter, what typer reads of it, and the default."""
    keyword, written = inspect.Parameter.KEYWORD_ONLY, inspect.signature(command, eval_str=True).parameters
    kept = [each for name, each in written.items() if each.kind is not each.VAR_KEYWORD and name not in options]
    added = [inspect.Parameter(n, keyword, default=default, annotation=each) for n, (each, default) in options.items()]
    command.__annotations__ |= {each.name: each.annotation for each in added}
    command.__signature__ = inspect.Signature([*kept, *added])


def section(title: str, options: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, Any]]:
    """Options of one section of the help, for :func:`declare`: a type, a help, and what else typer is told, by name."""
    declared = {}
    for name, (kind, help, *more) in options.items():
        told: dict[str, Any] = dict(*more)
        flag = told.pop("flag", f"--{name.strip('_').replace('_', '-')}")
        declared[name] = (Annotated[kind | None, typer.Option(flag, help=help, rich_help_panel=title, **told)], None)
    return declared


def output_dir(help: str) -> Any:
    """``--output-dir``, a folder that the command writes."""
    return typer.Option("--output-dir", metavar="DIR", help=help)


def output(help: str) -> Any:
    """``--output``, a file that the command writes."""
    return typer.Option("--output", help=help)


def names(option: str, help: str, default: str) -> Any:
    """An option for several names; read it with :func:`several`."""
    return typer.Option(option, metavar="NAMES", help=f"{help} (a,b or repeated). [default: {default}]")


def numbers(option: str, help: str, default: str) -> Any:
    """An option for several whole numbers; read it with :func:`whole_numbers`."""
    return typer.Option(option, metavar="NUMBERS", help=f"{help} (a,b or repeated). [default: {default}]")


def settings(help: str, option: str = "--set") -> Any:
    """``--set KEY=VALUE``; read it with ``sparsepeft.training.parse_settings``."""
    return typer.Option(option, metavar="KEY=VALUE", help=f"{help}; may be repeated.")


def dtype(option: str, help: str) -> Any:
    """An option for a dtype: its short name, though PyTorch's is taken, too."""
    return typer.Option(option, metavar="DTYPE", help=help, callback=lambda value: value and short_dtype(value))


DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="SPARSEPEFT_DATA",
        show_envvar=False,
        help="Folder with the tasks' files. [default: $SPARSEPEFT_DATA, else the hub]",
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Hub id or local folder. [default: the bundled MiniLM]")
]
TrainedModel = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The backbone, if it has moved since training.")
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or mps. [default: the accelerator, else cpu]")
]
Infer = Annotated[
    str | None,
    typer.Option(metavar="WAY", help="How a sparse run answers: sparse, or dense, as the model it was made from."),
]
Precision = Annotated[str, dtype("--precision", "fp32, bf16 or fp16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs per forward pass.")]
MaxExamples = Annotated[int | None, typer.Option(min=1, help="A sample of so many texts. [default: all]")]
Seed = Annotated[int, typer.Option(help="Seed of initialisation and order.")]
Recipe = Annotated[str, typer.Option(metavar="NAME", help="Hyperparameters: paper or best.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="A running Ray cluster, such as HOST:6379, or auto. [default: one started here]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
# Fields of ``sparsepeft.training.TableOptions``.
ROWS: dict[str, tuple[Any, ...]] = {
    "text_column": (str, "Column of the text. [default: as in training]"),
    "text_pair_column": (str, "Column of the second text, for pairs."),
    "label_column": (str, "Column of the label, or columns of 0 and 1: joy,anger. [default: as in training]"),
    "delimiter": (str, "Between columns of CSV and TSV. [default: found]"),
    "encoding": (str, "Of the file, such as utf-8 or cp1252. [default: found]"),
}
