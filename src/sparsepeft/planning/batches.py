"""Reading a batch that somebody passes for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


def read_batch(model: PreTrainedModel, data: Any, argument: str) -> dict[str, Tensor]:
    """What was passed as ``argument``, as keyword arguments on the model's device: (B, T, ...) each, without labels.

    Args:
        model: that takes them.
        data: input ids (B, T), or (T,) for one sequence, as a tensor or lists, or the mapping that the model takes.
        argument: its name, for errors.

    Raises:
        ValueError: it is no batch that the model could take.
    """
    if not isinstance(data, (Mapping, Tensor, str, list, tuple, np.ndarray)):
        raise ValueError(
            f"{argument} is {data!r:.80} ({type(data).__name__}); expected token ids (B, T), as a tensor or "
            "lists, or the mapping that the model takes."
        )
    batch = data if isinstance(data, Mapping) else {"input_ids": data}
    batch = {
        name: as_ids(value, argument) if isinstance(value, (str, list, tuple, np.ndarray)) else value
        for name, value in batch.items()
        if name != "labels"
    }
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if all(value.dim() == 1 for value in tensors.values()):  # one sequence
        tensors = {name: value[None] for name, value in tensors.items()}
    if not tensors or any(value.numel() == 0 for value in tensors.values()):
        raise ValueError(f"{argument} is empty; pass at least one sequence, for example input ids (B, T).")
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{argument} has NaN or infinite values in {name}; pass clean data.")
        if value.dim() < 2:
            raise ValueError(f"{argument} has {name} of shape {tuple(value.shape)}; expected (B, T, ...).")
        if name.endswith("input_ids"):
            _check_ids(argument, name, value, model)
        if name.endswith("attention_mask") and value.dim() == 2 and not value.any():
            raise ValueError(
                f"{argument} has 0 everywhere in {name}, as if all tokens were padding; pass the tokenizer's."
            )
    return {name: value.to(model.device) for name, value in tensors.items()}


def _check_ids(argument: str, name: str, ids: Tensor, model: PreTrainedModel) -> None:
    """Refuse ids without an embedding; on an accelerator the failed lookup would make the device unusable."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{argument} has {name} of shape {tuple(ids.shape)} and {ids.dtype}; expected whole numbers (B, T)."
        )
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    least, most = (int(bound) for bound in ids.aminmax())
    worst = least if least < 0 else most
    if name == "input_ids" and size is not None and not 0 <= worst < size:
        raise ValueError(
            f"{argument} has the token id {worst}, but {type(model).__name__} knows 0 to {size - 1}; pass what "
            "its own tokenizer gives."
        )


def as_ids(data: Any, argument: str) -> Tensor:
    """Lists of token ids, passed as ``argument``, as a tensor (B, T), or (T,) from a single list.

    Raises:
        ValueError: they are none.
    """
    if isinstance(data, str) or (len(data) and isinstance(data[0], str)):
        raise ValueError(
            f"{argument} holds texts, but a model is run on token ids; pass "
            "tokenizer(texts, padding=True, return_tensors='pt')."
        )
    rows = [row for row in data if isinstance(row, (list, tuple, np.ndarray, Tensor))]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"{argument} has sequences of {lengths[0]} to {lengths[-1]} token ids; pad or cut them to one length."
        )
    try:
        return torch.stack([torch.as_tensor(row) for row in data]) if rows else torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument} is {data!r:.80}; expected token ids (B, T).") from error
