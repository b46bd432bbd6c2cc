"""As vLLM is asked: ``/classify``, ``/v1/models``; and tasks that come and go, as its adapters do."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from sparsepeft_serve.batcher import Options
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.scores import Function, check_labels_texts, label_of, scores
from sparsepeft_serve.service import Service

Ids = list[StrictInt]


class ClassifyRequest(BaseModel):
    """Texts, or token ids, for the task that ``model`` names."""

    model_config = ConfigDict(extra="ignore")

    model: Annotated[str | None, Field(description="The task; the default one if left out.")] = None
    input: str | list[str] | Ids | list[Ids]
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1)] = None
    use_activation: Annotated[bool | None, Field(description="False gives logits as `probs`.")] = None


class Classified(BaseModel):
    """Of one input."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int
    error: str | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyResponse(BaseModel):
    """In the order of the inputs."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class Model(BaseModel):
    """The backbone, or a task on it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "sparsepeft"
    root: str
    parent: str | None
    max_model_len: int | None


class Models(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[Model]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes, started = APIRouter(tags=["vLLM"]), int(time.time())

    @routes.post("/classify", response_model=ClassifyResponse, response_model_exclude_none=False)
    @routes.post("/v1/classify", response_model=ClassifyResponse)
    async def classify(request: ClassifyRequest) -> Any:
        """Name each input's label, with the probability of every one."""
        task, info = service.task(request.model)
        check_labels_texts(task, info)
        inputs = _inputs(request.input)
        is_batch = len(inputs) > 1
        truncation = request.truncate_prompt_tokens is not None
        if request.truncate_prompt_tokens not in (None, -1):
            raise ServiceError(
                "`truncate_prompt_tokens` was given as a number of tokens; pass -1, which cuts at what the task takes."
            )
        method = "batch" if is_batch else "single"
        predictions = await service.predict(task, inputs, Options(truncation), method, in_part=is_batch)
        function: Function | None = "none" if request.use_activation is False else None
        num_tokens = sum(each.num_tokens for each in predictions)
        data = [
            Classified(
                index=index,
                label=label_of(each, info) if each.error is None else None,
                probs=scores(each, info, function) if each.error is None else [],
                num_classes=info.num_outputs,
                error=each.error,
            )
            for index, each in enumerate(predictions)
        ]
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=task,
            data=data,
            usage=Usage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )

    @routes.get("/v1/models", response_model=Models)
    async def models() -> Any:
        """The backbone and the tasks on it."""
        engine = service.engine
        backbone = engine.backbone_name
        tasks = [
            Model(id=name, created=started, root=info.folder.name, parent=backbone, max_model_len=info.max_length)
            for name, info in engine.tasks.items()
        ]
        base = Model(id=backbone, created=started, root=backbone, parent=None, max_model_len=engine.longest_input)
        return Models(data=[base, *tasks])

    return routes


def _inputs(value: str | list[str] | Ids | list[Ids]) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not value:
        raise ServiceError("`input` is empty; pass a text, texts, or token ids.", "Empty")
    if isinstance(value[0], int):
        return [{"input_ids": value}]
    return [one if isinstance(one, str) else {"input_ids": one} for one in value]
