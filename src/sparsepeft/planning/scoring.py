"""The loss of a language model on a text, again and again with a change in one of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from sparsepeft.models.blocks import Block, find_blocks
from sparsepeft.models.logits import deferred_logits, next_token_labels
from sparsepeft.models.modes import in_mode
from sparsepeft.planning.batches import as_ids, read_batch

_TOKENS = 4096  # at most so many in a pass
_IGNORED = -100


class Text(NamedTuple):
    """What a language model is scored on.

    Attributes:
        batch: the model's arguments, (B, T, ...) each.
        labels: as transformers takes them, (B, T), -100 where nothing is predicted.
    """

    batch: dict[str, Tensor]
    labels: Tensor

    def rows(self, start: int, stop: int) -> Text:
        """Some of its sequences."""
        return Text({name: value[start:stop] for name, value in self.batch.items()}, self.labels[start:stop])

    def at_most(self, count: int) -> Text:
        """With ``count`` labels, evenly spaced, in as few sequences as have them."""
        num_rows = max(1, min(len(self.labels), count // self.labels.shape[1]))
        few = self.rows(0, num_rows)
        places = (few.labels != _IGNORED).flatten().nonzero()[:, 0]
        if len(places) <= count:
            return few
        chosen = places[torch.linspace(0, len(places) - 1, count).long()]
        labels = torch.full_like(few.labels, _IGNORED).flatten()
        labels[chosen] = few.labels.flatten()[chosen]
        return Text(few.batch, labels.view_as(few.labels))


def read_text(model: PreTrainedModel, data: Any, argument: str = "data") -> Text:
    """What a language model is to predict of a batch: the next tokens, or the labels of a masked model.

    Args:
        model: a causal or masked language model.
        data: see :func:`sparsepeft.planning.batches.read_batch`, with ``input_ids``; a mapping may have ``labels`` as
            transformers takes them, (B, T), and needs them for a masked model.
        argument: the name of ``data``, for errors.

    Raises:
        ValueError: the model is none, the data no such batch, or there is nothing to predict.
    """
    batch = read_batch(model, data, argument)
    if "input_ids" not in batch:
        raise ValueError(f"A budget is measured on token ids, but {argument} has {', '.join(batch)}; pass input_ids.")
    shape = batch["input_ids"].shape
    labels = data.get("labels") if isinstance(data, Mapping) else None
    if labels is not None:
        labels = labels if isinstance(labels, Tensor) else as_ids(labels, argument)
        if labels.numel() != shape.numel():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} were passed with input_ids of shape {tuple(shape)}; a budget "
                "needs a language model's, one for each token."
            )
        labels = labels.view(shape)
    mappings: tuple[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    is_causal, is_masked = (isinstance(model, mapping.get(type(model.config), ())) for mapping in mappings)
    if not (is_causal or is_masked) or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no causal or masked language model, so it has no perplexity to keep to; load "
            "the model with its language-model head, or leave out the budget."
        )
    if labels is None and is_causal:
        labels = next_token_labels(batch["input_ids"], batch.get("attention_mask"))
    if labels is None:
        raise ValueError(
            f"{type(model).__name__} is a masked language model, and {argument} has no labels; mask some tokens and "
            "pass labels with input_ids, as transformers' DataCollatorForLanguageModeling makes them."
        )
    labels = labels.to(model.device, copy=True)
    if is_causal:
        labels[:, 0] = _IGNORED  # nothing is before it to predict it from
    if not (labels != _IGNORED).any():
        raise ValueError(
            f"{argument} has no token that the model could predict; pass longer sequences, or other labels."
        )
    return Text(batch, labels)


class LossMeter:
    """Mean loss of a predicted token, of a model that changes from one call to the next.

    Layers before the one that changed are not run again: they give what they gave when the meter was made, unless the
    model's layers share keys and values (Gemma 3n and 4).

    Args:
        model: a causal or masked language model.
        text: what it is scored on.
        resumable: remember what each layer gives, which takes (B, T, D) for each.

    Attributes:
        initial: the loss when the meter was made.
    """

    def __init__(self, model: PreTrainedModel, text: Text, *, resumable: bool = True) -> None:
        self._model = model
        # Layers that take the keys of those before them need these to be run.
        shares_keys = any(getattr(module, "is_kv_shared_layer", False) for module in model.modules())
        self._blocks = find_blocks(model) if resumable and not shares_keys else []
        num_rows = max(1, _TOKENS // text.labels.shape[1])
        parts = [text.rows(i, i + num_rows) for i in range(0, len(text.labels), num_rows)]
        self._parts = [part for part in parts if (part.labels != _IGNORED).any()]
        with _recorded(self._blocks) as self._outputs:
            self.initial = self._mean_loss()

    def loss(self, changed: str = "") -> float:
        """The loss now, if nothing but the module of that name, or modules behind it, is not as it was."""
        index = next((i for i, b in enumerate(self._blocks) if f"{changed}.".startswith(f"{b.name}.")), 0)
        before = {block: self._outputs[block.name] for block in self._blocks[:index]}
        if any(len(outputs) != len(self._parts) for outputs in before.values()):  # one layer in several places
            before = {}
        with _skipped(before):
            return self._mean_loss()

    @torch.no_grad()
    def _mean_loss(self) -> float:
        model, total, count = self._model, 0.0, 0
        with in_mode(model, training=False):
            for part in self._parts:
                with deferred_logits(model, always=True):
                    loss = model(**part.batch, labels=part.labels, **without_cache(model)).loss
                num_labels = int((part.labels != _IGNORED).sum())
                total, count = total + float(loss) * num_labels, count + num_labels
        return total / count


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument by which a model keeps no keys and values for more tokens, if it could."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _recorded(blocks: list[Block]) -> Iterator[dict[str, list[Any]]]:
    """Inside the context, what each layer gives is recorded, by its name."""
    outputs: dict[str, list[Any]] = {block.name: [] for block in blocks}

    def note(name: str) -> Any:
        return lambda module, args, output: outputs[name].append(output)

    handles = [block.module.register_forward_hook(note(block.name)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(given: Mapping[Block, list[Any]]) -> Iterator[None]:
    """Inside the context, layers give in each call what they are said to, and compute nothing."""
    before = {block: block.module.__dict__.get("forward") for block in given}
    for block, outputs in given.items():
        block.module.forward = partial(_next, iter(outputs))
    try:
        yield
    finally:
        for block, forward in before.items():
            del block.module.forward
            if forward is not None:  # accelerate has put its own there
                block.module.forward = forward


def _next(outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    """In a layer's place."""
    return next(outputs)
