"""Batches by token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def batches_by_tokens(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield indices of inputs of similar length, at most ``token_budget`` tokens a batch with its padding.

    An input that is longer than the budget makes a batch by itself.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of up to ``size`` items, so that memory stays bounded however many there are."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
