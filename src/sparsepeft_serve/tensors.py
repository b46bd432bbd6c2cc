"""Requests of the Open Inference Protocol: JSON with tensors of text, which may also lie as bytes behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from sparsepeft_serve.errors import ServiceError


class Tensor(BaseModel):
    """An input; or, by its name alone, an output that is wanted."""

    name: str
    datatype: str = "BYTES"
    shape: list[int] = []
    data: list[Any] = []


class InferParameters(BaseModel):
    """Others are of no use here, and may be there."""

    truncate: bool = False


class InferRequest(BaseModel):
    """Texts, [n] or [n, 1], or pairs, [n, 2]; ``parameters.truncate`` cuts what is longer than the task takes."""

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: list[Tensor] | None = None
    parameters: InferParameters = InferParameters()


def request_schema() -> dict[str, Any]:
    """What a request looks like, for OpenAPI."""
    schema = InferRequest.model_json_schema()
    tensor = schema.pop("$defs")["Tensor"]
    properties = schema["properties"]
    properties["inputs"]["items"] = tensor
    properties["outputs"]["anyOf"][0]["items"] = tensor
    return schema


def read_request(body: bytes, length: str | None) -> tuple[InferRequest, list[Any]]:
    """A request, and its texts and pairs of texts.

    Args:
        body: its JSON, and maybe the texts behind it.
        length: of the JSON, where they are.

    Raises:
        RequestValidationError: it is no request.
        ServiceError: its tensor is none of texts.
    """
    # Past so many digits Python reads no number.
    size = int(length) if length is not None and length.isdecimal() and len(length) < 20 else len(body)
    try:
        request = InferRequest.model_validate_json(body[:size])
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    (tensor,) = request.inputs
    texts = list(_flat(tensor.data) if tensor.data else _unpacked(body[size:]))
    num_rows, width = (*tensor.shape, 1)[:2] if len(tensor.shape) in (1, 2) else (0, 0)
    if (
        (tensor.name, tensor.datatype) != ("text", "BYTES")
        or width not in (1, 2)
        or len(texts) != num_rows * width
        or not all(isinstance(text, str) for text in texts)
    ):
        raise ServiceError(
            f"The input {tensor.name!r:.80} is {tensor.datatype:.80} {tensor.shape!s:.80} with {len(texts)} elements; "
            "expected `text`, BYTES [n] or, for pairs, [n, 2], with as many texts."
        )
    return request, texts if width == 1 else [texts[place : place + 2] for place in range(0, len(texts), 2)]


def _flat(data: list[Any]) -> Iterator[Any]:
    for value in data:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _unpacked(packed: bytes) -> Iterator[str]:
    """Each text is behind its length, four bytes, the lowest first."""
    place = 0
    while place < len(packed):
        end = place + 4 + int.from_bytes(packed[place : place + 4], "little")
        if end > len(packed):
            raise ServiceError(
                f"A text behind the JSON would end at byte {end}, but there are {len(packed)} bytes; put four bytes "
                "with its length, the lowest first, before each text."
            )
        try:
            yield packed[place + 4 : end].decode()
        except UnicodeDecodeError as error:
            raise ServiceError(f"A text behind the JSON is not UTF-8 ({error}); encode it so.") from error
        place = end
