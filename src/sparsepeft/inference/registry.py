"""Which tasks are loaded, and which of them calls still use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.inference.task import LoadedTask


class TaskRegistry:
    """Tasks by name. A call works on the tasks as they were when it began; a change is one assignment.

    A task that was taken away is deleted from its model when the last call that uses it has ended.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, LoadedTask] = {}
        self._retired: list[LoadedTask] = []
        self._changing = threading.Lock()  # held while a task is loaded, or retired ones are deleted
        self._counting = threading.Lock()  # held for moments only, so that no call waits for a task to be loaded

    def now(self) -> dict[str, LoadedTask]:
        """The tasks at this moment."""
        with self._counting:
            return dict(self._tasks)

    @contextmanager
    def in_use(self) -> Iterator[dict[str, LoadedTask]]:
        """The tasks at this moment; none of them is deleted while this lasts."""
        with self._counting:
            tasks = dict(self._tasks)
            for task in tasks.values():
                task.users += 1
        try:
            yield tasks
        finally:
            with self._counting:
                for task in tasks.values():
                    task.users -= 1
            # Whoever is changing the tasks deletes what can be deleted when they have done.
            if self._retired and self._changing.acquire(blocking=False):
                try:
                    self._delete_retired()
                finally:
                    self._changing.release()

    def add(self, name: str, load: Callable[[], LoadedTask]) -> None:
        """Load a task under a name that is free."""
        _check_name(name)
        with self._changing:
            if name in self._tasks:
                raise UserError(f"The task {name!r} is loaded already; call replace() to put another in its place.")
            self._put(name, load())

    def replace(self, name: str, load: Callable[[], LoadedTask]) -> None:
        """Load a task in place of one that is there."""
        with self._changing:
            find(self._tasks, name)
            self._put(name, load())

    def remove(self, name: str) -> None:
        """Forget a task."""
        with self._changing:
            find(self._tasks, name)
            self._put(name, None)

    def _put(self, name: str, task: LoadedTask | None) -> None:
        with self._counting:
            if name in self._tasks:
                self._retired.append(self._tasks[name])
            if task is None:
                del self._tasks[name]
            else:
                self._tasks[name] = task
        self._delete_retired()

    def _delete_retired(self) -> None:
        with self._counting:
            done = [task for task in self._retired if task.users == 0]
            self._retired = [task for task in self._retired if task.users > 0]
        for task in done:
            task.model.delete(task.adapter_name)


def find(tasks: Mapping[str, LoadedTask], name: str) -> LoadedTask:
    """The task of this name.

    Raises:
        UserError: there is none, or the name is no text.
    """
    _check_name(name)
    if name in tasks:
        return tasks[name]
    if not tasks:
        raise UserError(f"The task {name!r} is unknown, as no task is loaded; add() one first.")
    raise UserError(unknown_name("The task", name, tasks))


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise UserError(
            f"The task {name!r:.80} ({type(name).__name__}) was given; a task's name is a text that is not empty."
        )
