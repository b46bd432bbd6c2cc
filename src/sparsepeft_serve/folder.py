"""The folder whose folders are tasks, watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sparsepeft.errors import UserError
from sparsepeft.inference.folders import task_folders
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.service import Service

logger = logging.getLogger(__name__)

_ENDINGS = (".json", ".safetensors")
Signature = tuple[tuple[str, int, int], ...]


def folder_of(root: Path | None, name: str) -> Path:
    """A task's folder inside the tasks folder.

    Raises:
        ServiceError: there is no tasks folder, or none of this name inside it.
    """
    if root is None:
        raise ServiceError("The service has no tasks folder to load from; start it with --tasks-dir.", status=403)
    inside = root.resolve()
    try:
        path = (inside / name).resolve()
        is_name = Path(name).name == name and not name.startswith(".")
        is_inside = is_name and path.parent == inside and path.is_dir()
    except (OSError, ValueError):  # such as a name with a zero in it
        is_inside = False
    if not is_inside:
        raise ServiceError(f"There is no folder {name!r:.80} in the tasks folder.", status=404)
    return path


def signature(folder: Path) -> Signature:
    """What changes when a task's files do: names, sizes and times."""
    files = []
    for file in folder.iterdir():
        if file.suffix in _ENDINGS:
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns))
    return tuple(sorted(files))


def signatures(root: Path) -> dict[str, Signature]:
    """Those of all tasks in a folder, by name.

    Raises:
        UserError: there is no such folder.
    """
    found = {}
    for name, path in task_folders(root).items():
        with suppress(OSError):  # it is being replaced
            found[name] = signature(path)
    return found


class FolderWatch:
    """Loads tasks that come into a folder or change there, and forgets those that go.

    A task is loaded when its files have been the same at two looks in a row, and forgotten when its folder was gone at
    two. One that cannot be loaded is told in the log once, and its former version goes on answering, as does one whose
    files are no task's any more. A task from elsewhere that has the name of a folder is left alone.

    Args:
        service: whose tasks they are.
        root: the folder.
        interval_s: between two looks.
    """

    def __init__(self, service: Service, root: Path, interval_s: float = 1.0) -> None:
        self._service, self._root, self._interval_s = service, root, interval_s
        self._seen: dict[str, Signature] = {}
        self._tried: dict[str, Signature] = {}
        self._missing: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def note_loaded(self, signatures: Mapping[str, Signature]) -> None:
        """Tasks of the folder that are loaded, with the signatures that their files had then."""
        self._seen, self._tried = dict(signatures), dict(signatures)

    def start(self) -> None:
        """Begin to look, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._look_again_and_again())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Look once."""
        try:
            folders = task_folders(self._root)
        except UserError as error:
            logger.warning("%s", error)
            return
        for name, path in folders.items():
            try:
                now = signature(path)
            except OSError:  # it is being replaced
                continue
            is_still = self._seen.get(name) == now
            self._seen[name] = now
            if is_still and self._tried.get(name) != now:
                self._tried[name] = now
                if not self._may_change(name):
                    logger.warning("task %s: left as it was: its folder is %s", name, self._folder_of_task(name))
                    continue
                try:
                    is_new = await self._service.load(name, path)
                    logger.info("task %s: %s", name, "loaded" if is_new else "replaced")
                except ServiceError as error:
                    logger.warning("task %s: left as it was: %s", name, error.message)
        missing = {name for name in self._tried if not (self._root / name).exists()}
        for name in missing & self._missing:
            del self._tried[name]
            self._seen.pop(name, None)
            if name in self._service.engine.tasks and self._may_change(name):
                await self._service.unload(name)
                logger.info("task %s: gone", name)
        self._missing = missing

    def _may_change(self, name: str) -> bool:
        """Whether a task of that name is new, or one of the folder's."""
        return name not in self._service.engine.tasks or self._folder_of_task(name).parent == self._root.resolve()

    def _folder_of_task(self, name: str) -> Path:
        return self._service.engine.tasks[name].folder.resolve()

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except Exception:  # the next look may go better
                logger.exception("The tasks folder could not be watched.")
