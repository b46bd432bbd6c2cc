"""Who may ask: bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from fastapi import Request

from sparsepeft_serve.errors import ServiceError

_OPEN = (
    "/health",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
)  # that those who watch over services ask without a token


def is_allowed(authorization: str | None, tokens: tuple[str, ...]) -> bool:
    """Whether a header shows one of the tokens."""
    scheme, _, shown = (authorization or "").partition(" ")
    given = shown.strip().encode() if scheme.lower() == "bearer" else b""
    equal = [hmac.compare_digest(given, token.encode()) for token in tokens]  # all: time does not say which was close
    return any(equal)


def needs_token(path: str) -> bool:
    """Whether an address is for those alone who show a token, where there are any."""
    return path not in _OPEN


def callers_only(tokens: tuple[str, ...], admin_tokens: tuple[str, ...]) -> Callable[[Request], None]:
    """A dependency that lets only those through who show a token, where there are any."""

    def check(request: Request) -> None:
        # Not the URL's path: where the header Host is taken into it, callers could choose it.
        if not tokens or not needs_token(request.scope["path"]):
            return
        if not is_allowed(request.headers.get("authorization"), (*tokens, *admin_tokens)):
            raise ServiceError("The request shows no valid token; send `Authorization: Bearer TOKEN`.", status=401)

    return check


def admin_only(tokens: tuple[str, ...]) -> Callable[[Request], None]:
    """A dependency that lets only those through who may change tasks."""

    def check(request: Request) -> None:
        if not tokens:
            raise ServiceError(
                "Tasks cannot be changed over HTTP, as the service has no admin token; use --admin-token-file.",
                status=403,
            )
        if not is_allowed(request.headers.get("authorization"), tokens):
            raise ServiceError("The request shows no admin token; send `Authorization: Bearer TOKEN`.", status=401)

    return check
