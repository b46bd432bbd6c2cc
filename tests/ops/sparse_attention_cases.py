"""Inputs of sparse attention that the tests share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.sparse_attention import sparse_attention

NAMES = ("output", "query", "key", "value")


class Case(NamedTuple):
    """Sizes, a padding mask by name, and the options of the call."""

    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    head_size: int
    value_size: int
    width: int
    top_l: int
    mask: str = "none"
    options: Mapping[str, Any] = MappingProxyType({})


# Odd on purpose; each name says what it adds.
CASES = {
    "plain": Case(2, 2, 2, 65, 65, 16, 16, 8, 9),
    "causal": Case(2, 2, 2, 65, 65, 16, 16, 8, 9, options={"causal": True}),
    "several tiles": Case(1, 2, 1, 130, 130, 24, 24, 8, 33, options={"causal": True}),
    "grouped heads": Case(2, 6, 2, 37, 37, 16, 16, 4, 7, options={"causal": True}),
    "one key head": Case(1, 4, 1, 70, 70, 16, 16, 4, 7),
    "left padding": Case(3, 2, 2, 66, 66, 16, 16, 8, 9, "left", {"causal": True}),
    "right padding": Case(3, 2, 1, 66, 66, 16, 16, 8, 9, "right"),
    "a row wholly masked": Case(3, 2, 1, 41, 41, 16, 16, 8, 9, "row"),
    "scattered mask": Case(2, 2, 2, 90, 90, 16, 16, 8, 12, "scattered", {"causal": True}),
    "window": Case(1, 2, 2, 130, 130, 16, 16, 8, 9, options={"causal": True, "window": 40}),
    "window and padding": Case(3, 2, 2, 90, 90, 16, 16, 8, 9, "scattered", {"causal": True, "window": 21}),
    "window of one": Case(1, 2, 2, 20, 20, 16, 16, 8, 4, options={"causal": True, "window": 1}),
    "one query": Case(2, 4, 2, 1, 77, 16, 16, 8, 9, "left", {"causal": True}),
    "last queries": Case(2, 2, 2, 19, 77, 16, 16, 8, 9, options={"causal": True}),
    "positions": Case(2, 2, 2, 19, 77, 16, 16, 8, 9, options={"causal": True, "query_positions": range(30, 49)}),
    "positions outside": Case(1, 2, 2, 7, 20, 16, 16, 8, 4, options={"query_positions": range(-3, 25, 4)}),
    "positions before all keys": Case(
        1, 2, 2, 5, 20, 16, 16, 8, 4, options={"causal": True, "query_positions": range(-3, 2)}
    ),
    "more queries than keys": Case(1, 2, 2, 50, 20, 16, 16, 8, 4),
    "one token": Case(2, 2, 1, 1, 1, 16, 16, 8, 3, options={"causal": True}),
    "seven tokens": Case(2, 2, 2, 7, 7, 8, 8, 8, 3, options={"causal": True}),
    "one sub-vector": Case(1, 2, 2, 65, 65, 8, 8, 8, 9, options={"causal": True}),
    "sub-vectors of one number": Case(1, 2, 2, 33, 33, 20, 20, 1, 5),
    "one key kept": Case(1, 2, 2, 65, 65, 16, 16, 8, 1, options={"causal": True}),
    "one key kept, not the own": Case(1, 2, 2, 65, 65, 16, 16, 8, 1, options={"keep_self": False, "keep_first": False}),
    "two keys kept": Case(1, 2, 2, 65, 65, 16, 16, 8, 2, options={"causal": True}),
    "nothing forced": Case(2, 2, 2, 65, 65, 16, 16, 4, 9, "scattered", {"keep_self": False, "keep_first": False}),
    "first alone forced": Case(1, 2, 2, 65, 65, 16, 16, 4, 9, options={"keep_self": False}),
    "all keys": Case(2, 2, 2, 65, 65, 16, 16, 8, 65, "scattered", {"causal": True}),
    "more than all keys": Case(2, 2, 2, 65, 65, 16, 16, 8, 1000),
    "values of another size": Case(1, 2, 2, 40, 40, 16, 40, 8, 9, options={"causal": True}),
    "wide heads": Case(1, 2, 2, 70, 70, 128, 128, 8, 12, options={"causal": True}),
    "odd heads": Case(1, 2, 2, 70, 70, 80, 72, 8, 12),
    "narrow heads": Case(1, 3, 3, 70, 70, 8, 5, 4, 12),
    "scale": Case(1, 2, 2, 40, 40, 16, 16, 8, 9, options={"scale": 0.7}),
    "softcap": Case(1, 2, 2, 65, 65, 16, 16, 8, 20, "left", {"causal": True, "softcap": 1.5}),
}


def make_mask(name: str, batch: int, num_keys: int) -> Tensor | None:
    if name == "none":
        return None
    mask = torch.ones(batch, num_keys, dtype=torch.bool)
    for row in range(1, batch):
        hidden = num_keys * row // (2 * batch) + 1
        if name == "left":
            mask[row, :hidden] = False
        if name == "right":
            mask[row, num_keys - hidden :] = False
    if name == "row":
        mask[1] = False
    if name == "scattered":
        mask = torch.rand(batch, num_keys) > 0.3
    return mask


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Return query, key, value, and the keyword arguments of the call, codebooks included."""
    tensors = [
        torch.randn(case.batch, case.heads, case.num_queries, case.head_size).to(dtype),
        torch.randn(case.batch, case.kv_heads, case.num_keys, case.head_size).to(dtype),
        torch.randn(case.batch, case.kv_heads, case.num_keys, case.value_size).to(dtype),
    ]
    codebooks = torch.randn(case.kv_heads, case.head_size // case.width, 16, case.width)
    options = dict(case.options)
    if "query_positions" in options:
        options["query_positions"] = torch.tensor(list(options["query_positions"]))
    mask = make_mask(case.mask, case.batch, case.num_keys)
    return tensors, {"codebooks": codebooks, "top_l": case.top_l, "key_mask": mask, **options}


def run(tensors: list[Tensor], grad_output: Tensor, **options: Any) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = sparse_attention(*leaves, **options)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return dict(zip(NAMES, (output.detach(), *grads), strict=True))


def grad_like(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(case.batch, case.heads, case.num_queries, case.value_size).to(dtype)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the largest entry of each tensor; NaN never matches."""
    for name in NAMES:
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
