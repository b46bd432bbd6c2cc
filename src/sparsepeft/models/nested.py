"""Tensors inside what a module takes and returns: alone, or in tuples, lists and dictionaries (feature maps)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def map_tensors(change: Callable[..., Any], value: Any, *others: Any) -> Any:
    """The same with each tensor changed.

    Args:
        change: ``change(tensor, *tensors)`` with the tensors at the same place in ``others``.
        value: a tensor, or tuples, lists and dictionaries of tensors and other things, which stay.
        others: values built alike.
    """
    if isinstance(value, torch.Tensor):
        return change(value, *others)
    if isinstance(value, (tuple, list)):
        changed = [map_tensors(change, *each) for each in zip(value, *others, strict=True)]
        return _like(value, changed)
    if isinstance(value, dict):
        return {key: map_tensors(change, each, *(other[key] for other in others)) for key, each in value.items()}
    return value


def _like(value: Any, items: Iterable[Any]) -> Any:
    """``items`` in the class of ``value``, a tuple, a named one, or a list."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
