"""The loss of a language model on a text, again and again with a change in one of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from sparsepeft.models.blocks import Block, find_blocks

_LOGITS = 2**27  # at most so many at once, 512 MiB in float32
_CHUNK = 2**24  # of them in a softmax
_IGNORED = -100


class Text(NamedTuple):
    """What a language model is scored on.

    Attributes:
        batch: the model's arguments, (B, T, ...) each.
        targets: the token to be predicted at each position, (B, T); -100 where none is.
    """

    batch: dict[str, Tensor]
    targets: Tensor

    def rows(self, start: int, stop: int) -> Text:
        """Some of its sequences."""
        return Text({name: value[start:stop] for name, value in self.batch.items()}, self.targets[start:stop])

    def at_most(self, count: int) -> Text:
        """With ``count`` targets, evenly spaced, in as few sequences as have them."""
        num_rows = max(1, min(len(self.targets), count // self.targets.shape[1]))
        few = self.rows(0, num_rows)
        places = (few.targets != _IGNORED).flatten().nonzero()[:, 0]
        if len(places) <= count:
            return few
        chosen = places[torch.linspace(0, len(places) - 1, count).long()]
        targets = torch.full_like(few.targets, _IGNORED).flatten()
        targets[chosen] = few.targets.flatten()[chosen]
        return Text(few.batch, targets.view_as(few.targets))


def text_for(model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Tensor | None = None) -> Text:
    """What a language model is to predict: the next tokens, or the labels of a masked model.

    Args:
        model: a causal or masked language model.
        batch: its arguments, with ``input_ids`` (B, T).
        labels: as transformers takes them, (B, T); a causal model's may be left out.

    Raises:
        ValueError: the model is none, or there is nothing to predict.
    """
    mappings: tuple[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    is_causal, is_masked = (isinstance(model, mapping.get(type(model.config), ())) for mapping in mappings)
    if not (is_causal or is_masked) or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} is no causal or masked language model, so it has no perplexity to keep to; load "
            "the model with its language-model head, or leave out the budget."
        )
    if labels is None and is_causal:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
    if labels is None:
        raise ValueError(
            f"{type(model).__name__} is a masked language model, and the text has no labels; mask some tokens and pass "
            "labels with input_ids, as transformers' DataCollatorForLanguageModeling makes them."
        )
    targets = labels.to(model.device)
    if is_causal:
        targets = nn.functional.pad(targets[:, 1:], (0, 1), value=_IGNORED)
    if not (targets != _IGNORED).any():
        raise ValueError("The text has no token that the model could predict; pass longer sequences, or labels.")
    return Text(dict(batch), targets)


class LossMeter:
    """Mean loss of a predicted token, of a model that changes from one call to the next.

    Layers before the one that changed are not run again: they give what they gave when the meter was made.

    Args:
        model: a causal or masked language model.
        text: what it is scored on.
        resumable: remember what each layer gives, which takes (B, T, D) for each.

    Attributes:
        initial: the loss when the meter was made.
    """

    def __init__(self, model: PreTrainedModel, text: Text, *, resumable: bool = True) -> None:
        self._model = model
        self._blocks = find_blocks(model) if resumable else []
        num_rows = max(1, _LOGITS // (model.get_output_embeddings().weight.shape[0] * text.targets.shape[1]))
        self._parts = [text.rows(i, i + num_rows) for i in range(0, len(text.targets), num_rows)]
        self._given: list[dict[str, list[Any]]] = []
        self.initial = self._loss(record=True)

    def loss(self, changed: str = "") -> float:
        """The loss now, if nothing but the module of that name, or modules behind it, is not as it was."""
        return self._loss(before=self._before(changed))

    def _before(self, changed: str) -> list[Block]:
        index = next((i for i, b in enumerate(self._blocks) if f"{changed}.".startswith(f"{b.name}.")), 0)
        given = {block.name: [part[block.name] for part in self._given] for block in self._blocks[:index]}
        is_run_once = all(len(calls) == 1 for parts in given.values() for calls in parts)  # not a layer that is shared
        return self._blocks[:index] if is_run_once else []

    @torch.no_grad()
    def _loss(self, before: list[Block] | None = None, record: bool = False) -> float:
        model, total, count = self._model, 0.0, 0
        training = model.training
        model.eval()
        try:
            for index, part in enumerate(self._parts):
                if record:
                    with _recorded(self._blocks) as outputs:
                        logits = _logits(model, part)
                    self._given.append(outputs)
                else:
                    given = {block.name: self._given[index][block.name][0] for block in before or ()}
                    with _skipped(before or [], given):
                        logits = _logits(model, part)
                targets = part.targets[part.targets != _IGNORED]
                rows = max(1, _CHUNK // logits.shape[-1])
                for some, expected in zip(logits.split(rows), targets.split(rows), strict=True):
                    total += float(nn.functional.cross_entropy(some.float(), expected, reduction="sum"))
                count += len(targets)
        finally:
            model.train(training)
        return total / count


def _logits(model: PreTrainedModel, text: Text) -> Tensor:
    """Logits of the positions with a target alone, (N, V), with all that the model does to them."""
    chosen = text.targets != _IGNORED

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][chosen][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        logits: Tensor = model(**text.batch, **without_cache(model)).logits[0]
    finally:
        handle.remove()
    return logits


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
def _skipped(blocks: list[Block], given: dict[str, Any]) -> Iterator[None]:
    """Inside the context, layers give what they are said to, and compute nothing."""
    before = [block.module.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.module.forward = lambda *args, output=given[block.name], **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.module.forward
            if forward is not None:  # accelerate has put its own there
                block.module.forward = forward
