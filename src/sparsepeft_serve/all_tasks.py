"""Our own: every task for each text in one pass, what a memory reads, and tasks that come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from sparsepeft.inference import Prediction
from sparsepeft_serve.access import admin_only
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.folder import folder_of
from sparsepeft_serve.hub import Pair
from sparsepeft_serve.service import Service

_LINES_AT_ONCE, _PAUSE_S = 64, 0.1
NDJSON = "application/x-ndjson"


class PredictAllRequest(BaseModel):
    """Texts, each for several tasks."""

    inputs: str | Pair | list[str | Pair]
    tasks: Annotated[list[str] | None, Field(description="All that take as many texts, by default.")] = None
    stream: Annotated[bool, Field(description="Answer line by line, as soon as each is there.")] = False


class ReadingRequest(BaseModel):
    """A text, and the task whose memories are watched."""

    inputs: str | Pair
    task: Annotated[str | None, Field(description="The default one if left out.")] = None


class LayerOfReading(BaseModel):
    """What one memory read at each of T tokens, K parents each."""

    layer: Annotated[int, Field(description="Its position in its stack; where layers share a memory, the call.")]
    name: Annotated[str, Field(description="Of the layer in the model.")]
    num_parents: int
    parents: list[list[int]]
    gates: Annotated[list[list[float]], Field(description="The weight of each parent.")]
    children: Annotated[list[list[int]], Field(description="The child picked most under each.")]
    shares: Annotated[list[list[float]], Field(description="What its child values add, over the state's norm.")]


class ReadingResponse(BaseModel):
    """What the memories of a task read."""

    task: str
    tokens: list[str]
    layers: list[LayerOfReading]


class TaskFolder(BaseModel):
    """Where a task is."""

    folder: Annotated[str | None, Field(description="Inside the tasks folder; the task's name by default.")] = None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["sparsepeft"])

    @routes.post("/v1/predict_all", responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}}})
    async def predict_all(request: PredictAllRequest) -> Any:
        """Answer every task for each input; with ``stream`` a line of JSON for each, in order."""
        given = request.inputs if isinstance(request.inputs, list) else [request.inputs]
        inputs = [one if isinstance(one, str) else one.model_dump(exclude_none=True) for one in given]
        if request.stream:
            service.tasks_of(request.tasks)
            if not inputs:
                raise ServiceError("The request has no input; pass at least one text.", "Empty")
            return StreamingResponse(_lines(service, inputs, request.tasks), media_type=NDJSON)
        rows = await service.predict_all(inputs, request.tasks)
        return {"data": [_plain(row) for row in rows]}

    @routes.post("/v1/memories", response_model=ReadingResponse)
    async def memories(request: ReadingRequest) -> Any:
        """What each memory of a SPARTAN task reads at each token of a text."""
        task, _ = service.task(request.task)
        given = request.inputs
        text = given if isinstance(given, str) else given.model_dump(exclude_none=True)
        reading = await service.read(task, text)
        layers: list[Any] = [
            {name: value.tolist() if hasattr(value, "tolist") else value for name, value in each._asdict().items()}
            for each in reading.layers
        ]
        return ReadingResponse(task=task, tokens=reading.tokens, layers=layers)

    admin = [Depends(admin_only(service.settings.admin_tokens))]

    @routes.put("/v1/tasks/{task}", dependencies=admin, responses={201: {"description": "The task is new"}})
    async def load(task: str, response: Response, request: TaskFolder | None = None) -> dict[str, str]:
        """Load a task from the tasks folder, in place of the one of that name."""
        path = folder_of(service.settings.tasks_dir, (request and request.folder) or task)
        is_new = await service.load(task, path)
        response.status_code = 201 if is_new else 200
        return {"id": task, "root": path.name}

    @routes.delete("/v1/tasks/{task}", dependencies=admin, status_code=204)
    async def unload(task: str) -> None:
        """Forget a task; its files stay."""
        await service.unload(task)

    return routes


async def _lines(service: Service, inputs: list[Any], tasks: list[str] | None) -> AsyncIterator[str]:
    size = min(_LINES_AT_ONCE, service.settings.max_client_batch_size)
    for start in range(0, len(inputs), size):
        while True:
            try:
                rows = await service.predict_all(inputs[start : start + size], tasks)
                break
            except ServiceError as error:
                if error.kind == "Overloaded":  # a stream has time
                    await asyncio.sleep(_PAUSE_S)
                    continue
                # The answer has begun: its status cannot be changed any more.
                yield json.dumps({"error": error.message, "error_type": error.kind}) + "\n"
                return
        for row in rows:
            yield json.dumps(_plain(row)) + "\n"


def _plain(row: dict[str, Prediction]) -> dict[str, Any]:
    return {name: prediction.to_dict() for name, prediction in row.items()}
