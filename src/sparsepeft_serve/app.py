"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from sparsepeft import __version__
from sparsepeft.inference import MultiTaskEngine
from sparsepeft_serve import all_tasks, hub, open_inference, tei, vllm
from sparsepeft_serve.access import callers_only
from sparsepeft_serve.errors import ServiceError, content_of
from sparsepeft_serve.folder import FolderWatch, Signature, signatures
from sparsepeft_serve.limits import Limits
from sparsepeft_serve.service import Service
from sparsepeft_serve.settings import ServeSettings

PAGE = Path(__file__).parent / "page"
_NO_JSON = "The body is no JSON; send an object, as `/openapi.json` describes it."
_PROBLEM = {
    "type": "object",
    "properties": {"error": {}, "error_type": {"type": "string"}},
    "required": ["error"],
}


def create_app(
    engine: MultiTaskEngine, settings: ServeSettings | None = None, *, loaded: Mapping[str, Signature] | None = None
) -> FastAPI:
    """The application that answers for an engine; its tasks are those that are loaded.

    Args:
        engine: with its tasks.
        settings: of the service.
        loaded: what :func:`sparsepeft_serve.folder.signatures` said of the tasks folder before its tasks were loaded;
            by default they were loaded as they are when the service starts.

    Example:
        >>> from fastapi.testclient import TestClient
        >>> engine = MultiTaskEngine(tasks={"mood": "out/mood"})
        >>> with TestClient(create_app(engine)) as client:
        ...     client.post("/predict", json={"inputs": "a fine film"}).status_code
        200
    """
    settings = settings or ServeSettings()
    service = Service(engine, settings)
    watch = None if settings.tasks_dir is None else FolderWatch(service, settings.tasks_dir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        if watch is not None and settings.tasks_dir is not None:
            found = signatures(settings.tasks_dir) if loaded is None else loaded
            watch.note_loaded({name: files for name, files in found.items() if name in engine.tasks})
            watch.start()
        yield
        if watch is not None:
            await watch.close()
        await service.batcher.close()

    app = FastAPI(
        title="sparsepeft",
        version=__version__,
        description="One backbone, many tasks.",
        docs_url=None,  # its page is read from another address
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(callers_only(settings.tokens, settings.admin_tokens))],
        responses={status: _described(text) for status, text in _ANSWERS.items()},
    )
    app.state.service = service
    for shape in (tei, hub, vllm, open_inference, all_tasks):
        app.include_router(shape.router(service))
    # Neither asks for a token: a browser shows none, and the page has a field for it.
    app.mount("/page", StaticFiles(directory=PAGE, html=True))
    app.add_route("/", _to_page)

    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    app.add_middleware(Limits, settings=settings)
    return app


_ANSWERS = {
    400: "There is no input, or the body is no JSON",
    401: "No valid token",
    403: "Tasks cannot be changed over HTTP",
    404: "No such task",
    405: "No such method here",
    408: "The body came too slowly",
    413: "The body is too large",
    422: "What was asked cannot be answered",
    424: "The model failed",
    429: "Too many texts wait",
    503: "Not ready, stopping, or the task was replaced meanwhile",
}


def _described(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _PROBLEM}}}


def _answer(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    more = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content_of(error, request.scope["path"]), error.status, {**(headers or {}), **more})


async def _to_page(request: Request) -> RedirectResponse:
    return RedirectResponse("page/")


async def _on_service_error(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error)


async def _on_validation_error(request: Request, error: Any) -> JSONResponse:
    # Of forms that a value may have, the one that it comes closest to complains of something inside it.
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return _answer(request, ServiceError(_NO_JSON, status=400))
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    kind = request.headers.get("content-type", "")
    if not place and first["type"] != "missing" and "json" not in kind:
        message = f"The body has the Content-Type {kind!r:.80}; send an object of JSON with `application/json`."
    else:
        message = f"`{place or 'body'}` cannot be used: {first['msg']}."
    return _answer(request, ServiceError(message))


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    asked = f"{request.method} {request.scope['path']:.80}"
    messages = {
        400: _NO_JSON,  # or it is nested too deeply
        404: f"Not Found: {asked}; `/openapi.json` lists the addresses.",
        405: f"Method Not Allowed: {asked}; `/openapi.json` lists the methods of each address.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _answer(request, ServiceError(message, status=error.status_code), error.headers)


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    """The server's log has the error, which says nothing to a caller."""
    return _answer(request, ServiceError("The service failed; its log says why.", "Backend", status=500))
