"""The one error that loading a task raises."""

from __future__ import annotations

from sparsepeft.errors import UserError


class TaskError(UserError):
    """A task's name, files or labels cannot be used: says what was received, what was expected and what to do."""
