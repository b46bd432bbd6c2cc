"""As huggingface_hub's ``InferenceClient`` asks: a post to the address itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from sparsepeft_serve.batcher import Options
from sparsepeft_serve.scores import Function, raised, ranked
from sparsepeft_serve.service import Service


class Pair(BaseModel):
    """A text, and for tasks about pairs a second one."""

    text: str
    text_pair: str | None = None


class Parameters(BaseModel):
    """How to answer."""

    top_k: Annotated[int | None, Field(ge=1, description="So many labels, the best ones; all by default.")] = None
    function_to_apply: Annotated[Function | None, Field(description="Of the logits; by the task's kind.")] = None
    truncation: bool = True
    truncation_side: Literal["left", "right"] | None = None


class ClassificationRequest(BaseModel):
    """One input, or several."""

    inputs: str | Pair | list[str | Pair]
    parameters: Parameters | None = None


class Label(BaseModel):
    """With its score."""

    label: str
    score: float


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["huggingface_hub"])

    async def answer(name: str | None, request: ClassificationRequest) -> list[list[dict[str, Any]]]:
        task, info = service.task(name)
        parameters = request.parameters or Parameters()
        several = isinstance(request.inputs, list)
        inputs: list[Any] = request.inputs if isinstance(request.inputs, list) else [request.inputs]
        texts = [one if isinstance(one, str) else one.model_dump(exclude_none=True) for one in inputs]
        options = Options(parameters.truncation, parameters.truncation_side)
        predictions = await service.predict(task, texts, options, "batch" if several else "single")
        return [ranked(raised(each), info, parameters.function_to_apply)[: parameters.top_k] for each in predictions]

    @routes.post("/", response_model=list[list[Label]])
    async def classify(request: ClassificationRequest) -> Any:
        """Score the labels of the default task: a list for each input."""
        return await answer(None, request)

    @routes.post("/tasks/{task}", response_model=list[list[Label]])
    async def classify_task(task: str, request: ClassificationRequest) -> Any:
        """Score the labels of a task: a list for each input."""
        return await answer(task, request)

    return routes
