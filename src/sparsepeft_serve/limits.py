"""Bodies that are too large or too slow, callers who leave, and a line in the log for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsepeft_serve.errors import ServiceError, content_of
from sparsepeft_serve.settings import ServeSettings

logger = logging.getLogger("sparsepeft_serve.requests")


class Limits:
    """ASGI middleware: refuses a body past its limits, stops work for a caller who has left, and logs each request.

    The log has method, path, status (499 where the caller left) and time, but no text.

    Args:
        app: that is asked.
        settings: of the service.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, is_answered = time.perf_counter(), 500, False  # of a fault the server tells the caller

        async def noted(message: Message) -> None:
            nonlocal status, is_answered
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                is_answered = not message.get("more_body", False)
            await send(message)

        try:
            try:
                body = await self._read(scope, receive)
            except ServiceError as error:
                await _refuse(error, scope["path"], noted)
                return
            answering = asyncio.ensure_future(self._app(scope, _replay(body, receive), noted))
            leaving = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if answering.done() or is_answered:
                    await answering
                else:
                    status = 499
            finally:
                for one in (answering, leaving):
                    one.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)
        finally:
            logger.info(
                "%s",
                json.dumps(
                    {
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "ms": round(1000 * (time.perf_counter() - began), 2),
                    }
                ),
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.payload_limit
        too_large = ServiceError(
            f"The request's body has more than {limit} bytes; send the texts in several requests.", status=413
        )
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        parts: list[bytes] = []
        size, deadline = 0, time.perf_counter() + self._settings.body_timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.perf_counter()))
            except TimeoutError:
                raise ServiceError(
                    f"The request's body did not arrive within {self._settings.body_timeout:g} seconds.", status=408
                ) from None
            if message["type"] == "http.disconnect":
                raise ServiceError("The caller has gone.", status=408)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    """Wait until the caller leaves, or has the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` of an app whose request's body has been read."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(error: ServiceError, path: str, send: Any) -> None:
    body = json.dumps(content_of(error, path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # What was not read of the body would be taken for the next request.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
