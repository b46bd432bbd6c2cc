"""Frozen weights in the dtype in which they are multiplied."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn


def hold_frozen_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in the dtype that autocast multiplies them in.

    Autocast casts them anew in every pass, to the same numbers: outputs and gradients stay what they are bit for bit,
    in less time and memory. Weights that another module reads too, such as tied embeddings, are left alone.

    Args:
        model: that computes under autocast alone from here on.
        dtype: autocast's.
    """
    readers = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if type(module) is nn.Linear and not any(p.requires_grad or readers[id(p)] > 1 for p in parameters):
            module.to(dtype)
