"""What a request can be answered with instead of an answer."""

from __future__ import annotations

from typing import Any

from sparsepeft.inference.portable import NO_TOKENS, NOT_FINITE

_VLLM = ("/classify", "/v1/classify", "/v1/models")


class ServiceError(Exception):
    """A request that is not answered.

    Args:
        message: what was received, what was expected and what to do.
        kind: as text-embeddings-inference names it: ``"Empty"``, ``"Validation"``, ``"Tokenizer"``, ``"Backend"``,
            ``"Overloaded"``, ``"Unhealthy"``.
        status: of HTTP; None is the one that goes with the kind.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self, message: str, kind: str = "Validation", *, status: int | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.kind, self.retry_after = message, kind, retry_after
        self.status = _STATUS[kind] if status is None else status


_STATUS = {"Empty": 400, "Validation": 422, "Tokenizer": 422, "Backend": 424, "Overloaded": 429, "Unhealthy": 503}

_KINDS = {NO_TOKENS: "Tokenizer", NOT_FINITE: "Backend"}  # of predictions with an error; the others are "Validation"


def kind_of(error: str) -> str:
    """The kind of the error that a prediction has in the place of an answer."""
    return _KINDS.get(error, "Validation")


def overloaded(limit: int) -> ServiceError:
    """More texts wait than may."""
    return ServiceError(
        f"The service is overloaded: {limit} texts are waiting already; ask again later, or send fewer at a time.",
        "Overloaded",
        retry_after=1,
    )


def content_of(error: ServiceError, path: str) -> dict[str, Any]:
    """The body of an answer that is an error, in the shape of the path's clients."""
    if path in _VLLM:
        shown = {"message": error.message, "type": error.kind, "param": None, "code": error.status}
        return {"error": shown, "error_type": error.kind}
    return {"error": error.message, "error_type": error.kind}
