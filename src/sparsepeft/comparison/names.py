"""Which methods can be compared; nothing heavy is loaded, so that names are checked at once."""

from __future__ import annotations

from collections.abc import Sequence

from sparsepeft.arguments import check_choice
from sparsepeft.errors import UserError
from sparsepeft.methods.recipes import METHODS
from sparsepeft.tasks.spec import LANGUAGE_MODEL

COMPARED = ("head", "spartan", "pfeiffer", "lora", "full")


def check_names(task: str | None, methods: Sequence[str]) -> list[str]:
    """The methods, each once.

    Args:
        task: what they are to be compared on; None where that is not known yet.
        methods: some of :data:`sparsepeft.methods.recipes.METHODS`.

    Raises:
        UserError: one is unknown, there are none, or the task has no labelled texts.
    """
    if task == LANGUAGE_MODEL:
        raise UserError(
            f"`task={task}` was given, but methods are compared on labelled texts; train a language model by "
            "`sparsepeft train` with each method, and compare the perplexities."
        )
    if isinstance(methods, str) or not methods:
        raise UserError(f"`methods={methods!r}` was given, but it must be a list with some of {', '.join(METHODS)}.")
    for method in methods:
        check_choice("methods", method, METHODS)
    return list(dict.fromkeys(methods))
