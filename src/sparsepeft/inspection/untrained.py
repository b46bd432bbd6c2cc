"""A fresh memory beside a trained one, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel


@contextmanager
def untrained_adapter(model: PeftModel, seed: int) -> Iterator[str]:
    """Make a fresh adapter with the active one's config active; afterwards it is gone and all is as before.

    Args:
        model: the adapted model.
        seed: of the fresh adapter's weights; the global random state is left alone.

    Yields:
        The fresh adapter's name.
    """
    active: Any = model.active_adapter
    name = "untrained"
    while name in model.peft_config:
        name += "_"
    config: Any = copy.deepcopy(model.peft_config[active])
    inference_mode, config.inference_mode = config.inference_mode, False
    config.modules_to_save = None  # noted when an adapter is attached
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(name, config)
    try:
        model.set_adapter(name)
        yield name
    finally:
        model.set_adapter(active, inference_mode=inference_mode)
        model.delete_adapter(name)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
