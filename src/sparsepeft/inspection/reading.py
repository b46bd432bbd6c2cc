"""What the memories of a loaded task read in one text."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

from sparsepeft.errors import UserError
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.inference.answering import Row, batch_logits, user_errors
from sparsepeft.inference.portable import NO_TOKENS, Input, texts_of
from sparsepeft.inspection.collect import memories_of
from sparsepeft.inspection.picks import read


class LayerReading(NamedTuple):
    """What one layer's memory read at each of T tokens, K parents each, the one with the largest weight first.

    Attributes:
        layer: the layer's position in its stack (an encoder-decoder has two such layers); where layers share a memory,
            as ALBERT's do, the number of the call.
        name: the layer's dotted name in the bare model.
        num_parents: P.
        parents: that were picked, (T, K).
        gates: their weights, which sum to one, (T, K).
        children: the child picked most under each, (T, K).
        shares: the norm of what each parent's child values add, over the norm of the state, (T, K).
    """

    layer: int
    name: str
    num_parents: int
    parents: np.ndarray
    gates: np.ndarray
    children: np.ndarray
    shares: np.ndarray


class TextReading(NamedTuple):
    """What all memories of a task read in a text.

    Attributes:
        tokens: as the tokenizer names them, T. A decoder behind an encoder reads its start token first, then these.
        layers: in the order in which they read.
    """

    tokens: list[str]
    layers: list[LayerReading]


def read_text(engine: MultiTaskEngine, name: str, text: Input) -> TextReading:
    """Ask a task about one text, and watch its memories.

    Args:
        engine: with the task; calls in other threads are not watched, nor disturbed.
        name: of a task of the method SPARTAN.
        text: a text, or a pair of them; what is too long is cut as in training.

    Raises:
        UserError: there is no such task, it has no memory, or the text cannot be answered.

    Example:
        >>> engine = MultiTaskEngine("FacebookAI/roberta-base", tasks={"sst2": "out/sst2"})
        >>> reading = read_text(engine, "sst2", "a fine film")
        >>> reading.layers[-1].parents.shape[0] == len(reading.tokens)
        True
    """
    readings: list[LayerReading] = []
    thread = threading.get_ident()

    def look(layer: int, name: str, memory: Any, args: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            parts = [part for _, part in read(memory, args[0].reshape(-1, args[0].shape[-1]))]
            parents, gates, children, shares = (
                np.concatenate([part[field].cpu().numpy() for part in parts]) for field in range(4)
            )
            readings.append(LayerReading(layer, name, memory.num_parents, parents, gates, children, shares))

    with engine.loaded(name) as task, ExitStack() as hooks:
        with user_errors():
            (encoded,) = task.encoder([texts_of(text, task.info.num_texts)], task.max_length)
        if not len(encoded):
            raise UserError(NO_TOKENS)
        model = task.view.model
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        memories = memories_of(bare, task.adapter_name, "default")  # PEFT's name, of a task that is answered alone
        if not memories:
            raise UserError(f"The task {name!r} has no SPARTAN memory to look into; ask one of the method spartan.")
        for each in memories:
            hooks.callback(each.memory.register_forward_pre_hook(partial(look, each.index, each.name)).remove)
        batch_logits([Row(0, task, encoded)])
        tokens = task.encoder.tokenizer.convert_ids_to_tokens(encoded.features["input_ids"])
    if len(readings) > len(memories):
        readings = [each._replace(layer=call) for call, each in enumerate(readings)]
    return TextReading(list(tokens), readings)
