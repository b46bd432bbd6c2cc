"""All commands. Modules with torch, transformers or peft are imported where they are used: help loads none."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from sparsepeft_cli import (
    benchmark,
    compare,
    data,
    demo,
    evaluate,
    export,
    generate,
    history,
    inspect,
    predict,
    push,
    reproduce,
    serve,
    sparsify,
    storage,
    sweep,
    train,
)
from sparsepeft_cli.terminal.errors import Command
from sparsepeft_cli.terminal.help import PlainGroup
from sparsepeft_cli.terminal.interrupts import Stop, Stopped, handling, stop_at_once

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse parameter-efficient fine-tuning of Transformers. `--debug` anywhere shows tracebacks.",
)
for _module in (
    data,
    train,
    compare,
    sweep,
    history,
    evaluate,
    predict,
    generate,
    push,
    serve,
    export,
    sparsify,
    inspect,
    storage,
    demo,
):
    app.command(_module.__name__.rpartition(".")[2], cls=Command)(_module.command)
app.add_typer(reproduce.app, name="reproduce")
app.add_typer(benchmark.app, name="benchmark")


def _show_version(asked: bool) -> None:
    """Print this package's version and those of what it stands on, without loading any of it, and end."""
    if not asked:
        return
    others = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))
    typer.echo(f"sparsepeft {_version('sparsepeft')} ({others}, Python {platform.python_version()})")
    raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None: ...


def run() -> None:
    """Run a command: exit code 0 on success, 2 for what was given wrongly, 1 for what failed while running.

    A signal ends it with 128 and the signal's number.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _quiet()
    try:
        with handling(stop_at_once):
            app()
    except (Stopped, Stop) as error:
        stop = error.stop if isinstance(error, Stopped) else error
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except Exception as error:  # the boundary to the user: every failure becomes one sentence and an exit code
        if debug:
            raise
        from sparsepeft.errors import RunFailed, UserError

        sentence = " ".join(str(error).split())
        if not isinstance(error, (UserError, RunFailed)):
            sentence = f"{type(error).__name__}: {sentence.rstrip('.')} (not foreseen; --debug shows where)."
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _quiet() -> None:
    """Leave the screen to this program's own messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, says when it starts
    import logging
    import warnings

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("sparsepeft").setLevel(logging.WARNING)
    for name in ("torchao", "torch.utils._pytree"):  # torchao, if installed, talks on import
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", module="sparsepeft")
