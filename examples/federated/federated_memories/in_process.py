"""A federation whose clients take turns in this process: for a test or an experiment, where Ray would be too much."""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from federated_memories import client_app, server_app
from sparsepeft.arguments import check_whole
from sparsepeft.errors import UserError, unknown_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_RUN_ID, _SERVER_ID = 1, 1


def default_values() -> dict[str, Any]:
    """The values of ``[tool.flwr.app.config]``."""
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]


def run_in_process(num_clients: int, **values: Any) -> dict[str, Any]:
    """Run server and clients of the app.

    Args:
        num_clients: how many there are, and are waited for.
        values: of the app's config, with underscores, where they differ from its own.

    Returns:
        The content of ``federation.json``.

    Raises:
        UserError: a value is not known, or cannot be used.
        RunFailed: there was a round that no client finished.
    """
    check_whole("num_clients", num_clients)
    given = {name.replace("_", "-"): value for name, value in values.items()} | {"num-clients": num_clients}
    merged = default_values()
    for name in given.keys() - merged.keys():
        raise UserError(unknown_name("value", name, merged))
    merged |= given
    with tempfile.TemporaryDirectory() as work:
        folder = Path(merged["output-dir"] or work)
        merged["output-dir"] = str(folder)
        context = Context(_RUN_ID, 0, {}, RecordDict(), merged)
        server_app.app(LocalGrid(client_app.app, merged, num_clients), context)
        return json.loads((folder / "federation.json").read_text(encoding="utf-8"))


class LocalGrid(Grid):
    """Clients that answer one after another, in the order of their numbers, as soon as they are sent a message."""

    def __init__(self, app: ClientApp, values: dict[str, Any], num_clients: int) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN_ID, 1, _SERVER_ID  # messages bear them
        self._app, self._replies = app, dict[str, Message]()
        self._contexts = {
            _SERVER_ID + 1 + index: Context(
                _RUN_ID,
                _SERVER_ID + 1 + index,
                {"partition-id": index, "num-partitions": num_clients},
                RecordDict(),
                values,
            )
            for index in range(num_clients)
        }

    @property
    def run(self) -> Run:
        """Of Flower's runs one without a name."""
        return Run.create_empty(_RUN_ID)

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As Flower's own grids do it."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """The clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered; their ids."""
        ids = []
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            ids.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._replies[ids[-1]] = self._app(message, self._contexts[message.metadata.dst_node_id])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers."""
        return [self._replies.pop(name) for name in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Have messages answered; the answers."""
        return self.pull_messages(self.push_messages(messages))
