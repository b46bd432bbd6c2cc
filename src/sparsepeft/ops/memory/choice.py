"""Which implementation of the memory ``impl="auto"`` means."""

from __future__ import annotations

from typing import NamedTuple


class MemoryChoice(NamedTuple):
    """An implementation and why it was chosen."""

    impl: str
    reason: str


def explain_memory_impl(
    *, num_parents: int, num_children: int, top_k: int, hidden_size: int, num_tokens: int | None = None
) -> MemoryChoice:
    """Return the implementation ``impl="auto"`` picks for a memory of this shape, with the reason."""
    return MemoryChoice("masked", "placeholder")
