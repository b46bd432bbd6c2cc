"""Which implementation of the memory ``impl="auto"`` means.

The rule compares the work per token of the two forms, in products with a vector of size D. Scoring the parents is
common to both and left out. ``benchmarks/results/memory.json`` (2-core x86, float32, D=768, K=8) shows the crossover at
P between 64 and 128 for C=3 and between 16 and 32 for C=32; the constants reproduce it, and were checked at K=1, 2 and
16 with C=1 to 32. Neither D nor, from one token to thousands, the number of tokens moves the crossover much: the rule
leaves them out, so that a traced graph is chosen as the eager call is.
"""

from __future__ import annotations

from typing import NamedTuple

# A child's key and value read through the grouped, smaller products of the selected form: dense work is 2.
_SELECTED_CHILD_WORK = 3
# Gathering a token's vector for one parent and adding back what that parent read.
_SELECTED_PAIR_WORK = 80
# torch.export: keys and values of each selected child are gathered, nothing is shared between tokens. Measured with
# 256 tokens and K=8: even at about 350 parents, for C=3 and for C=32.
_GATHERED_CHILD_WORK = 100


class MemoryChoice(NamedTuple):
    """An implementation of :func:`memory_read` and, in a sentence, why it was chosen."""

    impl: str
    reason: str


def choose_memory_impl(num_parents: int, num_children: int, top_k: int, *, exporting: bool) -> str:
    """Return the name alone: the sizes may be symbolic while ``torch.compile`` traces, and then have no text."""
    masked, selected = _work(num_parents, num_children, top_k, exporting)
    return "selected" if selected < masked else "masked"


def explain_memory_impl(*, num_parents: int, num_children: int, top_k: int, exporting: bool = False) -> MemoryChoice:
    """Return the implementation ``impl="auto"`` picks for a memory of this shape, with the reason.

    Args:
        num_parents: P.
        num_children: children per parent, C.
        top_k: parents kept per token, K.
        exporting: whether ``torch.export`` is tracing; the selected form then has to gather.
    """
    masked, selected = _work(num_parents, num_children, top_k, exporting)
    shape = f"P={num_parents}, C={num_children}, K={top_k}{', exported' if exporting else ''}"
    return MemoryChoice(
        choose_memory_impl(num_parents, num_children, top_k, exporting=exporting),
        f"At {shape}, reading only the selected children costs as much as {selected} products with a vector per token, "
        f"{'less' if selected < masked else 'no less'} than the {masked} of the masked dense form.",
    )


def _work(num_parents: int, num_children: int, top_k: int, exporting: bool) -> tuple[int, int]:
    masked = 2 * num_parents * num_children
    if exporting:
        return masked, _GATHERED_CHILD_WORK * top_k * num_children
    return masked, top_k * (_SELECTED_CHILD_WORK * num_children + _SELECTED_PAIR_WORK)
