"""How a call or a run ends badly: something given was wrong, or something failed while running.

Messages mark parameters with backticks, by their names in Python: ```output_dir``` or, with what was received,
```seed=-1```. The command line shows its own names for them: ``--output-dir``, ``--seed -1``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given cannot be used; the message says what was received, what was expected and what to do."""


class TaskError(UserError):
    """A task's name, files or labels cannot be used: says what was received, what was expected and what to do."""


class RunFailed(RuntimeError):
    """A run that had started could not be finished; the message says what is left of it."""


class Diverged(RunFailed):
    """A run whose loss or weights are no longer finite: its hyperparameters are at fault, not the machine."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to stand in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence for a name that is not among ``valid``: the valid ones, and the nearest if one is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{kind} {name!r} is unknown; valid are {', '.join(names)}{hint}"
