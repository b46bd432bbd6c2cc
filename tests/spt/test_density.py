"""A sparse model that computes as the dense one: layer by layer, in the first steps, where labels count, in answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.spt.models import ALL, build, logits, sparse

from sparsepeft.spt import sparsification

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the same sums in another order


def layers(model: Any) -> list[Any]:
    state = sparsification(model)
    return [*state.attention.values(), *(routed for _, routed in state.feed_forwards)]


@pytest.mark.parametrize("name", ALL)
def test_a_dense_layer_is_the_dense_models(name: str) -> None:
    padding = "right" if name == "mistral" else "left"
    model, expected = sparse(name).double(), logits(build(name).double(), name, padding)
    before = logits(model, name, padding)
    for layer in layers(model):
        layer.dense = True
    torch.testing.assert_close(logits(model, name, padding), expected)
    layers(model)[0].dense = False
    partly = logits(model, name, padding)
    assert not torch.allclose(partly, expected, **CLOSE)
    assert not torch.allclose(partly, before, **CLOSE)
