"""A server in a thread, for clients that bring their own connection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from sparsepeft import MultiTaskEngine
from sparsepeft_serve import ServeSettings, create_app
from sparsepeft_serve.protocol import HeadTimeoutProtocol


@contextmanager
def answering(engine: MultiTaskEngine, settings: ServeSettings | None = None) -> Iterator[str]:
    """The address of a service."""
    app = create_app(engine, settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=HeadTimeoutProtocol, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(engine: MultiTaskEngine) -> Iterator[str]:
    with answering(engine) as address:
        yield address
