"""What goes wrong, said in the command line's own words."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from sparsepeft_cli.terminal.help import PlainCommand
from sparsepeft_cli.terminal.interrupts import Stopped
from sparsepeft_cli.terminal.options import current_names

_running: ContextVar[Sequence[Any]] = ContextVar("parameters of the command that runs", default=())
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MARKED = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


class Command(PlainCommand):
    """A command whose errors name its options where the library's name its parameters."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, old names of options among them."""
        return super().parse_args(ctx, current_names(self.callback, args))

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        from sparsepeft.errors import RunFailed, UserError

        _running.set(self.params)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(stop) from stop
        except (UserError, RunFailed) as error:
            error.args = (in_options(str(error)),)
            raise
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            what = error.filename or "A file"
            raise RunFailed(
                f"{what} could not be written ({error.strerror}); free space, or write elsewhere."
            ) from error


def in_options(text: str, parameters: Iterable[Any] | None = None) -> str:
    """A message or note of the library's with a command's options for the parameters it names.

    The library marks parameters by backticks: ```output_dir``` becomes ``--output-dir``, and ```seed=-1``` becomes
    ``--seed -1``. What is no parameter of the command stays as it is.

    Args:
        text: of the library's.
        parameters: of the command; None is the one that runs.
    """
    names = {parameter.name: _name(parameter) for parameter in (_running.get() if parameters is None else parameters)}

    def replace(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names:
            return match.group()
        return names[name] if value is None or value == "True" else f"{names[name]} {value}"

    return _MARKED.sub(replace, text)


def _name(parameter: Any) -> str:
    """The longest spelling of an option; an argument in capitals, as the usage line has it."""
    options = [name for name in parameter.opts if name.startswith("-")]
    return max(options, key=len) if options else parameter.metavar or str(parameter.name).upper()
