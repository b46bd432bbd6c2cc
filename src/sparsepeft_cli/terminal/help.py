"""Help as plain text: no option's name is ever cut, and it reads the same in a terminal, a pipe and a log."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.models import ArgumentInfo

_HYPHEN = "\u2011"  # stands for a hyphen at which no line may end, until the lines are made
_TYPE = re.compile(r" (?:<(?:list\[)?(\w+)(?: range)?\]?>|(TEXT|INTEGER|FLOAT|PATH)(?: RANGE)?)$")
_VALUES = {"str": "TEXT", "int": "N", "integer": "N", "float": "X", "path": "FILE"}
_EXAMPLE = re.compile(r"^Example: `(.+)`$", re.DOTALL)


class _Plain:
    """What commands and groups share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"rich_markup_mode": None})

    def get_help(self, ctx: Any) -> str:
        """The whole text."""
        return str(super().get_help(ctx)).replace(_HYPHEN, "-")  # type: ignore[misc]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the description, then the examples."""
        _write_text(self.help, formatter)  # type: ignore[attr-defined]


class PlainCommand(_Plain, TyperCommand):
    """A command whose options stand in sections, and whose examples can be copied."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Required arguments without the braces that typer puts around them."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, by section; an option too long for its column has a line of its own."""
        sections: dict[str, list[tuple[str, str]]] = {}
        _restore_help(self)
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            section = getattr(parameter, "rich_help_panel", None) or default
            sections.setdefault(section, []).append((_named(record[0], parameter), _unbroken(record[1])))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)


class PlainGroup(_Plain, TyperGroup):
    """The same for commands below commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the whole first paragraph of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, _unbroken(_paragraphs(found.help)[0]))
            for name, found in commands
            if found is not None and not found.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _restore_help(command: PlainCommand) -> None:
    """Give arguments the help that click 8.5 and later takes from those of typer 0.20."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and parameter.help is None:
            told = getattr(hints.get(str(parameter.name)), "__metadata__", ())
            parameter.help = next((each.help for each in told if isinstance(each, ArgumentInfo)), None)


def _named(name: str, parameter: Any) -> str:
    """An option with what it takes in capitals, where it says no more than a type; an argument by its name alone."""
    if parameter.param_type_name == "argument":
        return name.partition(" <")[0]
    return _TYPE.sub(_value, name)


def _value(found: re.Match[str]) -> str:
    kind = found.group(1) or found.group(2)
    return f" {_VALUES.get(kind.lower(), kind.upper())}"


def _unbroken(text: str) -> str:
    """The text with hyphens that hold its words together, as options need, and without typer's marks for rich."""
    return text.replace("\\[", "[").replace("-", _HYPHEN)


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]


def _write_text(text: str | None, formatter: Any) -> None:
    paragraphs = _paragraphs(text)
    examples = [found.group(1) for part in paragraphs if (found := _EXAMPLE.match(part))]
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(_unbroken("\n\n".join(part for part in paragraphs if not _EXAMPLE.match(part))))
    if examples:
        with formatter.section("Example" if len(examples) == 1 else "Examples"):
            for example in examples:
                _write_example(example, formatter)


def _write_example(example: str, formatter: Any) -> None:
    """A command line; one that is too long goes on after a backslash, before an option where it can."""
    indent, room = " " * formatter.current_indent, formatter.width - formatter.current_indent
    lines = [""]
    for part in re.split(r" (?=--|\")", example):
        joined = f"{lines[-1]} {part}" if lines[-1] else part
        if len(joined) + len(" \\") <= room or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(f"  {part}")
    formatter.write(" \\\n".join(indent + line for line in lines) + "\n")
