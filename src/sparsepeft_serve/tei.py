"""As text-embeddings-inference is asked: ``/predict``, ``/info``, ``/health``, ``/metrics``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from sparsepeft import __version__
from sparsepeft_serve.batcher import Options
from sparsepeft_serve.errors import ServiceError, kind_of
from sparsepeft_serve.scores import Function, check_labels_texts, label_names, ranked
from sparsepeft_serve.service import Service


class PredictRequest(BaseModel):
    """A text, a pair of texts, or several of either."""

    inputs: Annotated[
        str | list[str] | list[list[str]],
        Field(description="A text, or a list of it; two texts: a pair; lists of one or two texts: a batch."),
    ]
    truncate: Annotated[bool | None, Field(description="Cut what is longer than the task takes.")] = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    raw_scores: Annotated[bool, Field(description="Logits instead of probabilities.")] = False


class Score(BaseModel):
    """Of a label."""

    score: float
    label: str


class Problem(BaseModel):
    """Why there is no answer."""

    error: str
    error_type: str


Scores = list[Score]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["text-embeddings-inference"])

    async def answer(name: str | None, request: PredictRequest) -> Any:
        task, info = service.task(name)
        check_labels_texts(task, info)
        inputs, is_batch = read_inputs(request.inputs)
        side = request.truncation_direction.lower()
        options = Options(bool(request.truncate), side)
        method = "batch" if is_batch else "single"
        predictions = await service.predict(task, inputs, options, method, in_part=is_batch)
        function: Function | None = "none" if request.raw_scores else None
        if not is_batch:
            return ranked(predictions[0], info, function)
        return [
            ranked(each, info, function)
            if each.error is None
            else {"error": each.error, "error_type": kind_of(each.error)}
            for each in predictions
        ]

    @routes.post("/predict", response_model=Scores | list[Scores | Problem])
    async def predict(request: PredictRequest) -> Any:
        """Score the labels of the default task, the best first."""
        return await answer(None, request)

    @routes.post("/tasks/{task}/predict", response_model=Scores | list[Scores | Problem])
    async def predict_task(task: str, request: PredictRequest) -> Any:
        """Score the labels of a task, the best first."""
        return await answer(task, request)

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        """The backbone, the limits, and the tasks."""
        return about(service)

    @routes.get("/health", response_class=Response)
    @routes.get("/ping", response_class=Response)
    async def health() -> Response:
        """Whether requests are answered."""
        service.batcher.check_working()
        return Response()

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(service.batcher.num_waiting), media_type="text/plain; version=0.0.4")

    return routes


def read_inputs(value: str | list[str] | list[list[str]]) -> tuple[list[Any], bool]:
    """The inputs of a request, and whether it is a batch.

    Raises:
        ServiceError: they are none.
    """
    if isinstance(value, str):
        return [value], False
    if not value:
        raise ServiceError("`inputs` is empty; pass a text, a pair of texts, or a list of such lists.", "Empty")
    if all(isinstance(one, str) for one in value):
        return [_one(value)], False
    return [_one(one) for one in value], True


def _one(texts: Any) -> Any:
    if len(texts) not in (1, 2):
        raise ServiceError(
            f"`inputs` has {len(texts)} texts for one prediction; expected one, or two for a pair; a batch is a list "
            'of such lists, [["a"], ["b"]].'
        )
    return texts[0] if len(texts) == 1 else list(texts)


def about(service: Service) -> dict[str, Any]:
    """What ``/info`` says."""
    engine, settings = service.engine, service.settings
    tasks: dict[str, dict[str, Any]] = {
        name: {
            "labels": list(label_names(info)),
            "problem_type": info.problem_type,
            "thresholds": info.thresholds and dict(zip(label_names(info), info.thresholds, strict=True)),
            "num_texts": info.num_texts,
            "max_input_length": info.max_length,
        }
        for name, info in engine.tasks.items()
    }
    default = next(iter(tasks)) if len(tasks) == 1 else settings.default_task
    names: list[str] = tasks[default]["labels"] if default in tasks else []
    return {
        "model_id": engine.backbone_name,
        "model_sha": None,
        "model_dtype": str(engine.dtype).removeprefix("torch."),
        "model_type": {
            "classifier": {
                "id2label": {str(index): label for index, label in enumerate(names)},
                "label2id": {label: index for index, label in enumerate(names)},
            }
        },
        "max_concurrent_requests": settings.queue_size,
        "max_input_length": engine.longest_input,
        "max_batch_tokens": engine.token_budget,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "default_task": default,
        "tasks": tasks,
    }
