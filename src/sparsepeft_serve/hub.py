"""As huggingface_hub's ``InferenceClient`` asks: a post to the address itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sparsepeft.inference import Prediction
from sparsepeft.inference.entities import EntityOptions, Strategy, entity_options
from sparsepeft.inference.portable import InputError
from sparsepeft_serve.batcher import Options
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.scores import Function, ranked
from sparsepeft_serve.service import Service


class Pair(BaseModel):
    """A text, and for tasks about pairs a second one."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str | None = None


class Parameters(BaseModel):
    """How to answer: the first two are of tasks that label texts, the next three of those that label tokens."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int | None, Field(ge=1, description="So many labels, the best ones; all by default.")] = None
    function_to_apply: Annotated[Function | None, Field(description="Of the logits; by the task's kind.")] = None
    aggregation_strategy: Annotated[Strategy | None, Field(description="By word for runs, else `simple`.")] = None
    ignore_labels: Annotated[list[str] | None, Field(description='`["O"]` by default.')] = None
    stride: Annotated[int | None, Field(ge=0, description="Tokens that parts of a long text share.")] = None
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


class TokenEntity(BaseModel):
    """Of a text: ``entity`` is the label of a token, ``entity_group`` that of several."""

    entity: str | None = None
    entity_group: str | None = None
    score: float
    word: str
    start: int
    end: int


Answer = list[list[Label]] | list[TokenEntity] | list[list[TokenEntity]]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["huggingface_hub"])

    async def answer(name: str | None, request: ClassificationRequest) -> list[Any]:
        task, info = service.task(name)
        parameters = request.parameters or Parameters()
        _check_parameters(task, info.labels_tokens, parameters)
        entities = _entity_options(parameters)
        several = isinstance(request.inputs, list)
        inputs: list[Any] = request.inputs if isinstance(request.inputs, list) else [request.inputs]
        texts = [one if isinstance(one, str) else one.model_dump(exclude_none=True) for one in inputs]
        options = Options(parameters.truncation, parameters.truncation_side, entities=entities)
        predictions = await service.predict(task, texts, options, "batch" if several else "single")
        if info.labels_tokens:
            key = "entity" if entities.aggregation_strategy == "none" else "entity_group"
            found = [_entities(each, key) for each in predictions]
            return found if several else found[0]
        return [ranked(each, info, parameters.function_to_apply)[: parameters.top_k] for each in predictions]

    @routes.post("/", response_model=Answer, response_model_exclude_none=True)
    async def classify(request: ClassificationRequest) -> Any:
        """Score the labels of the default task, in a list for each input; or find the entities of each text."""
        return await answer(None, request)

    @routes.post("/tasks/{task}", response_model=Answer, response_model_exclude_none=True)
    async def classify_task(task: str, request: ClassificationRequest) -> Any:
        """Score the labels of a task, in a list for each input; or find the entities of each text."""
        return await answer(task, request)

    return routes


def _check_parameters(task: str, labels_tokens: bool, parameters: Parameters) -> None:
    """Refuse parameters that mean nothing to the kind of task.

    Raises:
        ServiceError: one is there.
    """
    of_texts, of_tokens = ("top_k", "function_to_apply"), ("aggregation_strategy", "ignore_labels", "stride")
    what, its_own, others = ("tokens", of_tokens, of_texts) if labels_tokens else ("texts", of_texts, of_tokens)
    for name in others:
        if getattr(parameters, name) is not None:
            raise ServiceError(
                f"`parameters.{name}` was given, but the task {task!r} labels {what} and takes {', '.join(its_own)}; "
                "leave it out."
            )


def _entity_options(parameters: Parameters) -> EntityOptions:
    """How tokens are put together.

    Raises:
        ServiceError: one of the parameters cannot be used.
    """
    ignored = ("O",) if parameters.ignore_labels is None else parameters.ignore_labels
    try:
        return entity_options(parameters.aggregation_strategy, ignored, parameters.stride)
    except InputError as error:
        raise ServiceError(str(error)) from error


def _entities(prediction: Prediction, key: str) -> list[dict[str, Any]]:
    found = prediction.to_dict()["entities"]
    return [{key: one.pop("label"), **one} for one in found]
