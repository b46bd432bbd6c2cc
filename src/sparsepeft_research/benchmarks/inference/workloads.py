"""What systems are given: a model in a folder, texts, and batches of their tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sparsepeft.backbones import default_backbone, describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import batches_by_length, longest_input
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.storage.counting import load_config
from sparsepeft.tasks import load_task

RANDOM = "roberta-base"
MAX_LENGTH, PADDED_BATCH, TOKEN_BUDGET = 128, 32, 4096
PADDED, BY_TOKENS = "padded", "by tokens"
_NUM_WORDS = 500


@dataclass(frozen=True)
class Model:
    """A backbone to measure.

    Attributes:
        folder: of its weights and tokenizer, or a hub id.
        name: for people and result files.
        tokenizer: whose lengths inputs have.
        architecture: the sizes that decide its speed.
    """

    folder: str
    name: str
    tokenizer: str
    architecture: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Inputs, and how they are run.

    Attributes:
        name: of the plan.
        texts: one or two texts of each input, for an engine.
        batches: rows of each batch, for a model.
        length: tokens to pad to; None for the longest of each batch.
        mode: ``"single"``: one task; ``"mixed"``: rows of all tasks in each batch; an engine's ``"all"``: every task
            for every text at once, and ``"separate"``: in a pass for each task.
        tensors: file of the padded batches.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    batches: tuple[tuple[int, ...], ...]
    length: int | None
    mode: str
    tensors: str

    @property
    def is_latency(self) -> bool:
        """Whether it is one input by itself."""
        return len(self.texts) == 1


def architecture(config: Any) -> dict[str, Any]:
    """The sizes of a backbone that decide its speed."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {"model_type": config.model_type} | {name: getattr(config, name, None) for name in names}


def prepare_model(model: str, folder: Path, seed: int) -> Model:
    """A model by name: ``"roberta-base"`` is RoBERTa-base with random weights, written to ``folder`` with a tokenizer.

    Raises:
        UserError: there is no such model.
    """
    if model != RANDOM or Path(model).is_dir():
        resolved = resolve_model(model)
        name = describe_backbone(resolved)
        return Model(resolved, name, name, architecture(load_config(resolved)))
    tokenizer_folder = str(default_backbone())
    minilm: Any = load_tokenizer(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=minilm.backend_tokenizer,
        model_max_length=minilm.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # RoBERTa has one type of token
        **minilm.special_tokens_map,
    )
    config = load_config(RANDOM)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name = f"{RANDOM}, random weights"
    return Model(str(folder), name, describe_backbone(tokenizer_folder), architecture(config))


class Planner:
    """Makes plans for a model, and writes their batches to files.

    Args:
        model: whose tokenizer counts.
        folder: for the files.
        seed: of words and samples.
    """

    def __init__(self, model: Model, folder: Path, seed: int) -> None:
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(model.folder)
        self._longest = longest_input(self._tokenizer, AutoConfig.from_pretrained(model.folder), None)
        self._folder, self._seed, self._count = folder, seed, 0

    def of_shape(self, batch_size: int, length: int, mode: str = "single") -> Plan:
        """One batch of texts of exactly ``length`` tokens.

        Raises:
            UserError: the model takes no texts of this length.
        """
        special = len(self._tokenizer("")["input_ids"])
        if not special < length <= self._longest:
            raise UserError(
                f"Texts of {length} tokens were asked for, but this model takes {special + 1} to {self._longest}; pass "
                "another length."
            )
        texts = [(text,) for text in self._words(batch_size, length - special)]
        name = f"{batch_size} x {length}" + ("" if mode == "single" else f", {mode}")
        return self._plan(name, texts, self._encode(texts, length), [list(range(batch_size))], length, mode)

    def of_task(self, task: str, data_dir: Path | None, max_inputs: int | None, batching: str) -> Plan:
        """A task's validation texts, or a sample of them: padded to 128 tokens by 32 in order, or by a token budget.

        Raises:
            UserError: the task's data cannot be read.
        """
        data = load_task(task, data_dir=data_dir)
        rows = list(range(len(data.validation)))
        if max_inputs is not None and max_inputs < len(rows):
            rows = random.Random(self._seed).sample(rows, max_inputs)
        columns = [data.validation.select(rows)[name][:] for name in data.spec.text_columns]
        texts = list(zip(*columns, strict=True))
        longest = min(MAX_LENGTH, self._longest)
        encoded = self._encode(texts, longest)
        if batching == PADDED:
            order = range(len(texts))
            batches = [list(order[i : i + PADDED_BATCH]) for i in range(0, len(texts), PADDED_BATCH)]
            return self._plan(f"{task}, {batching}", texts, encoded, batches, longest, "single")
        batches = list(batches_by_length([len(ids) for ids in encoded["input_ids"]], TOKEN_BUDGET))
        return self._plan(f"{task}, {batching}", texts, encoded, batches, None, "single")

    def _plan(
        self,
        name: str,
        texts: Sequence[tuple[str, ...]],
        encoded: dict[str, list[list[int]]],
        batches: list[list[int]],
        length: int | None,
        mode: str,
    ) -> Plan:
        tensors: dict[str, torch.Tensor] = {}
        for number, rows in enumerate(batches):
            features = [{key: values[row] for key, values in encoded.items()} for row in rows]
            padding: Any = {"padding": "max_length", "max_length": length} if length else {"padding": True}
            padded = self._tokenizer.pad(features, return_tensors="pt", **padding)
            tensors |= {f"{number}.{key}": tensor.contiguous() for key, tensor in padded.items()}
        path = self._folder / f"batches{self._count}.safetensors"
        self._count += 1
        save_file(tensors, path)
        return Plan(name, tuple(texts), tuple(map(tuple, batches)), length, mode, str(path))

    def _encode(self, texts: Sequence[tuple[str, ...]], longest: int) -> dict[str, list[list[int]]]:
        columns = [list(column) for column in zip(*texts, strict=True)]
        return dict(self._tokenizer(*columns, truncation=True, max_length=longest))

    def _words(self, count: int, length: int) -> list[str]:
        """Texts of random words that are one token each, so that tokens can be counted."""
        tokenizer, chosen = self._tokenizer, random.Random(self._seed)
        special = len(tokenizer("")["input_ids"])
        vocabulary = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
        chosen.shuffle(vocabulary)
        single = (word for word in vocabulary if len(tokenizer(f"{word} {word}")["input_ids"]) == special + 2)
        words = list(itertools.islice(single, _NUM_WORDS))
        return [" ".join(chosen.choices(words, k=length)) for _ in range(count)]


def count_flops(folder: str, batch_size: int, length: int) -> int:
    """Floating point operations of the matrix products of one pass of the backbone; a multiply-add counts two."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
    return int(counter.get_total_flops())
