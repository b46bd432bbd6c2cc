"""As the Open Inference Protocol asks (``/v2``), which KServe's and Triton's clients speak: a task is a model.

Source: github.com/kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``. Differs: of Triton's
extension for binary tensors requests are read, as its client sends them by default; answers are JSON.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from sparsepeft import __version__
from sparsepeft_serve.batcher import Options
from sparsepeft_serve.errors import ServiceError
from sparsepeft_serve.scores import check_labels_texts, label_of, scores
from sparsepeft_serve.service import Service
from sparsepeft_serve.tensors import read_request, request_schema

_OUTPUTS = {"probs": "FP32", "logits": "FP32", "label": "BYTES"}


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Open Inference Protocol"], prefix="/v2")
    schema = {"requestBody": {"content": {"application/json": {"schema": request_schema()}}}}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the service runs."""
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether requests are answered."""
        service.batcher.check_working()
        return {"live": True, "ready": True}  # the specification's text has one, its OpenAPI file the other

    @routes.get("")
    async def about() -> dict[str, Any]:
        """The server."""
        return {"name": "sparsepeft", "version": __version__, "extensions": []}

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> dict[str, Any]:
        """Whether a task is there."""
        return {"name": service.task(name)[0], "ready": True}

    @routes.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """The tensors of a task."""
        _, info = service.task(name)
        check_labels_texts(name, info)
        text = {"name": "text", "datatype": "BYTES", "shape": [-1, 2] if info.num_texts == 2 else [-1]}
        outputs = [_tensor(output, -1, info.num_outputs) for output in _OUTPUTS]
        return {"name": name, "platform": "sparsepeft_pytorch", "inputs": [text], "outputs": outputs}

    @routes.post("/models/{name}/infer", openapi_extra=schema)
    async def infer(name: str, request: Request) -> dict[str, Any]:
        """Probabilities, logits and the likeliest label of each text."""
        _, info = service.task(name)
        check_labels_texts(name, info)
        asked, texts = read_request(await request.body(), request.headers.get("inference-header-content-length"))
        wanted = list(_OUTPUTS) if asked.outputs is None else [output.name for output in asked.outputs]
        if unknown := [output for output in wanted if output not in _OUTPUTS]:
            raise ServiceError(f"The output {unknown[0]!r:.80} is unknown; ask for some of {', '.join(_OUTPUTS)}.")
        options = Options(asked.parameters.truncate)
        answers = await service.predict(name, texts, options, "batch")
        data: dict[str, list[Any]] = {
            "probs": [score for one in answers for score in scores(one, info)],
            "logits": [score for one in answers for score in scores(one, info, "none")],
            "label": [label_of(one, info) for one in answers],
        }
        outputs = [_tensor(output, len(answers), info.num_outputs) | {"data": data[output]} for output in wanted]
        return {"model_name": name, "outputs": outputs} | ({} if asked.id is None else {"id": asked.id})

    return routes


def _tensor(output: str, num_rows: int, num_outputs: int) -> dict[str, Any]:
    shape = [num_rows] if output == "label" else [num_rows, num_outputs]
    return {"name": output, "datatype": _OUTPUTS[output], "shape": shape}
