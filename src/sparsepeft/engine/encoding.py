"""Texts to token ids for the engine."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sparsepeft.engine.task import TaskInfo
from sparsepeft.training.encoding import longest_input


@dataclass(frozen=True)
class Encoded:
    """One input: what the tokenizer made of it, and whether it was cut."""

    features: dict[str, list[int]]
    truncated: bool

    def __len__(self) -> int:
        return len(self.features["input_ids"])


class Encoder:
    """The backbone's tokenizer, for several threads.

    Args:
        tokenizer: with a padding token.
        config: the backbone's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._lock = threading.Lock()  # a fast tokenizer keeps its truncation as state
        self._longest: dict[int | None, int] = {}  # by what tasks want

    def longest(self, info: TaskInfo) -> int:
        """Tokens an input of the task may have.

        Raises:
            UserError: it was trained on longer ones than this backbone takes.
        """
        if info.max_length not in self._longest:  # so that adding a task asks only once what the backbone takes
            self._longest[info.max_length] = longest_input(self.tokenizer, self.config, info.max_length)
        return self._longest[info.max_length]

    def __call__(self, inputs: list[tuple[str, ...]], max_length: int) -> list[Encoded]:
        """Encode texts, or pairs of texts, and cut those that are longer than ``max_length`` tokens."""
        if not inputs:
            return []
        encoded = [Encoded(features, False) for features in self._tokenize(inputs, truncation=False, verbose=False)]
        long = [row for row, one in enumerate(encoded) if len(one) > max_length]
        if long:
            cut = self._tokenize([inputs[row] for row in long], truncation=True, max_length=max_length)
            for row, features in zip(long, cut, strict=True):
                encoded[row] = Encoded(features, True)
        return encoded

    def _tokenize(self, inputs: list[tuple[str, ...]], **options: Any) -> list[dict[str, list[int]]]:
        columns = [list(column) for column in zip(*inputs, strict=True)]
        with self._lock:
            encoded = self.tokenizer(*columns, **options)
        return [{name: values[row] for name, values in encoded.items()} for row in range(len(inputs))]

    def collate(self, inputs: list[Encoded], device: torch.device) -> dict[str, torch.Tensor]:
        """Pad to the longest: tensors (B, T)."""
        features = [encoded.features for encoded in inputs]
        return dict(self.tokenizer.pad(features, return_tensors="pt").to(device))
