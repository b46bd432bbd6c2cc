"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.folder import FolderWatch, task_folders
from sparsepeft_serve.limits import Limits
from sparsepeft_serve.service import Service
from sparsepeft_serve.settings import ServeSettings

PAGE = Path(__file__).parent / "page"
_VLLM = ("/classify", "/v1/classify", "/v1/models")
_PROBLEM = {
    "type": "object",
    "properties": {"error": {}, "error_type": {"type": "string"}},
    "required": ["error"],
}


def create_app(engine: MultiTaskEngine, settings: ServeSettings | None = None) -> FastAPI:
    """The application that answers for an engine; its tasks are those that are loaded.

    Args:
        engine: with its tasks.
        settings: of the service.

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
            folders = task_folders(settings.tasks_dir)
            watch.note_loaded({name: path for name, path in folders.items() if name in engine.tasks})
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
    503: "Not ready, or stopping",
}


def _described(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _PROBLEM}}}


def _answer(request: Request, status: int, message: str, kind: str, retry_after: int | None = None) -> JSONResponse:
    """An error, in the shape of the path's clients."""
    content: dict[str, Any] = {"error": message, "error_type": kind}
    if request.url.path in _VLLM:
        content["error"] = {"message": message, "type": kind, "param": None, "code": status}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


async def _to_page(request: Request) -> RedirectResponse:
    return RedirectResponse("page/")


async def _on_service_error(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error.status, error.message, error.kind, error.retry_after)


async def _on_validation_error(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(
            request, 400, "The body is no JSON; send an object, as `/openapi.json` describes it.", "Validation"
        )
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return _answer(request, 422, f"`{place or 'body'}` cannot be used: {first['msg']}.", "Validation")


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error.status_code, str(error.detail), "Validation")
