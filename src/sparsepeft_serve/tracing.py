"""Traces by OpenTelemetry, where it is installed and set up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
except ImportError:
    trace = None  # type: ignore[assignment, unused-ignore]


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """Inside the context, a span with attributes; no text of a request is among them."""
    if trace is None:
        yield
        return
    with trace.get_tracer("sparsepeft").start_as_current_span(name) as current:
        for key, value in attributes.items():
            current.set_attribute(f"sparsepeft.{key}", value)
        yield
