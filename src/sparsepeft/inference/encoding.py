"""Turning texts into batches."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    DataCollatorForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from sparsepeft.errors import UserError
from sparsepeft.inference.portable import InputError
from sparsepeft.inference.sentences import SENTENCE

if TYPE_CHECKING:
    from datasets import Dataset

    from sparsepeft.tasks import TaskSpec

# Tokenizers without a limit report a huge number.
_NO_LIMIT = 1_000_000
_MOST_PARTS = 1024  # of a text, so that a stride which is nearly as long as a part does not take all memory
_SPANS = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
_NO_INPUTS = ("labels", "length", SENTENCE)
Item = TypeVar("Item")


def longest_input(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, wanted: int | None, name: str = "max_length"
) -> int:
    """How many tokens an input may have: ``wanted``, or what the model takes, at most 512.

    Raises:
        UserError: more than the model takes was wanted.
    """
    limits = [n for n in (tokenizer.model_max_length, num_positions(config)) if n]
    limit = min([n for n in limits if n < _NO_LIMIT], default=_NO_LIMIT)
    if wanted is not None and wanted > limit:
        raise UserError(f"`{name}={wanted}` was given, but this model takes at most {limit} tokens; pass less.")
    return wanted or min(limit, 512)


def num_positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model has positions for; None where it has no table of them.

    The table of RoBERTa, MPNet and their kin begins with rows that are for padding: of 514 rows 512 are positions. The
    configs of BART and OPT do not count such rows.
    """
    text = config.get_text_config()
    rows = getattr(text, "max_position_embeddings", None)
    if rows is None or rows < 1:  # XLNet says -1
        return None
    if type(text) not in MODEL_MAPPING:
        return int(rows)
    with torch.device("meta"):  # only the model itself tells
        model = AutoModel.from_config(text)
    padding = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return int(rows) - max((index + 1 for index in padding), default=0)


def encode(
    dataset: Dataset, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """Token ids of every example, with its label and length.

    Returns:
        The dataset (``input_ids``, ..., ``labels``, ``length``) and how many examples were cut to ``max_length``.
    """

    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        texts = [batch[name] for name in spec.text_columns]
        whole = tokenizer(*texts, truncation=False, verbose=False)["input_ids"]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        encoded["cut"] = [len(ids) > max_length for ids in whole]
        encoded["labels"] = batch["label"]
        return dict(encoded)

    encoded = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names, keep_in_memory=True)
    return encoded.remove_columns("cut"), sum(encoded["cut"])


@dataclass
class Collator:
    """Pads a batch to its longest example."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A list of encoded examples -> tensors (B, T), labels (B,), or (B, C) where several may hold.

        Labels are int64 for classes, float32 for values and for several labels' ones and zeros. Those of tokens are
        (B, T), with -100 where there is none.
        """
        labels = [example["labels"] for example in examples if "labels" in example]
        inputs = [{k: v for k, v in e.items() if k not in _NO_INPUTS} for e in examples]
        if labels and isinstance(labels[0], list) and isinstance(labels[0][0], int):
            rows = [{**row, "labels": tags} for row, tags in zip(inputs, labels, strict=True)]
            return dict(DataCollatorForTokenClassification(self.tokenizer)(rows))
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if labels:
            batch["labels"] = torch.tensor(labels, dtype=torch.long if isinstance(labels[0], int) else torch.float)
        return batch


class Spans(NamedTuple):
    """Where in a text its T tokens are.

    Attributes:
        text: as it was given.
        offsets: of each token's first character, and of the one after its last.
        special_tokens_mask: 1 for tokens that the tokenizer added.
    """

    text: str = ""
    offsets: Sequence[tuple[int, int]] = ()
    special_tokens_mask: Sequence[int] = ()


_NO_SPANS = Spans()


@dataclass(frozen=True)
class Encoded:
    """One input: what the tokenizer made of it, whether it was cut, and if it was asked for, where its tokens are."""

    features: dict[str, list[int]]
    truncated: bool
    spans: Spans = _NO_SPANS

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

    def longest(self, wanted: int | None) -> int:
        """Tokens an input of a task may have, see :func:`longest_input`.

        Raises:
            UserError: the task was trained on longer ones than this backbone takes.
        """
        if wanted not in self._longest:  # so that adding a task asks only once what the backbone takes
            self._longest[wanted] = longest_input(self.tokenizer, self.config, wanted)
        return self._longest[wanted]

    def __call__(
        self, inputs: list[tuple[str, ...]], max_length: int, side: str | None = None, *, with_spans: bool = False
    ) -> list[Encoded]:
        """Encode texts, or pairs of texts, and cut those that are longer than ``max_length`` tokens.

        Args:
            inputs: one or two texts each, all the same number.
            max_length: tokens, special ones included.
            side: where what is longer is cut, ``"left"`` or ``"right"``; None is the tokenizer's.
            with_spans: note where tokens are in the text, which slow tokenizers cannot tell.
        """
        if not inputs:
            return []
        more: dict[str, Any] = _SPANS if with_spans else {}
        whole = self._tokenize(inputs, truncation=False, verbose=False, **more)
        encoded = [_encoded(features, texts[0], False) for features, texts in zip(whole, inputs, strict=True)]
        long = [row for row, one in enumerate(encoded) if len(one) > max_length]
        if long:
            cut = self._tokenize([inputs[row] for row in long], side, truncation=True, max_length=max_length, **more)
            for row, features in zip(long, cut, strict=True):
                encoded[row] = _encoded(features, inputs[row][0], True)
        return encoded

    def parts(self, text: str, max_length: int, stride: int) -> list[Encoded]:
        """Encode all of a text, with spans, in parts of at most ``max_length`` tokens, of which neighbours share some.

        Raises:
            InputError: ``stride``, the number that they share, leaves a part no token of its own; or they are too many.
        """
        most = max_length - self.tokenizer.num_special_tokens_to_add()
        if stride >= most:
            raise InputError(
                f"`stride={stride}` was given, but a part of a text has at most {most} tokens beside the special ones; "
                "pass less."
            )
        (whole,) = self._tokenize([(text,)], truncation=False, verbose=False)
        num_tokens = len(whole["input_ids"]) - (max_length - most)
        num_parts = 1 + -(-max(0, num_tokens - most) // (most - stride))
        if num_parts > _MOST_PARTS:
            raise InputError(
                f"An input has {num_tokens} tokens, which `stride={stride}` makes {num_parts} parts of at most {most} "
                f"tokens; at most {_MOST_PARTS} are read: pass a shorter text, or a smaller stride."
            )
        options: dict[str, Any] = {"max_length": max_length, "stride": stride, **_SPANS}
        # From the right, whatever the tokenizer's side, so that parts come in the text's order.
        parts = self._tokenize([(text,)], "right", truncation=True, return_overflowing_tokens=True, **options)
        return [_encoded(features, text, False) for features in parts]

    def of_ids(self, features: Mapping[str, Any], max_length: int) -> Encoded:
        """An input that was encoded elsewhere, by the same tokenizer: ``input_ids``, special tokens included.

        Raises:
            InputError: it has something else, ids that there are none of, or more than ``max_length``.
        """
        ids = features["input_ids"]
        is_list = isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if features.keys() != {"input_ids"} or not is_list or not ids:
            raise InputError(f"An input is {dict(features)!r:.80}; expected input_ids, a list of whole numbers.")
        if not all(0 <= i < len(self.tokenizer) for i in ids):
            raise InputError(
                f"An input has the token ids {min(ids)} to {max(ids)}, but the tokenizer knows 0 to "
                f"{len(self.tokenizer) - 1}; pass what it gives."
            )
        if len(ids) > max_length:
            raise InputError(f"An input has {len(ids)} token ids, more than the {max_length} of its task; pass fewer.")
        others = {"attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        read = {name: values for name, values in others.items() if name in self.tokenizer.model_input_names}
        return Encoded({"input_ids": list(ids), **read}, False)

    def _tokenize(
        self, inputs: list[tuple[str, ...]], side: str | None = None, **options: Any
    ) -> list[dict[str, list[int]]]:
        columns = [list(column) for column in zip(*inputs, strict=True)]
        with self._lock:
            before = self.tokenizer.truncation_side
            self.tokenizer.truncation_side = side or before
            try:
                encoded = self.tokenizer(*columns, **options)
            finally:
                self.tokenizer.truncation_side = before
        encoded.pop("overflow_to_sample_mapping", None)
        return [{name: values[row] for name, values in encoded.items()} for row in range(len(encoded["input_ids"]))]

    def collate(self, inputs: list[Encoded], device: torch.device) -> dict[str, torch.Tensor]:
        """Pad to the longest: tensors (B, T)."""
        features = [encoded.features for encoded in inputs]
        return dict(self.tokenizer.pad(features, return_tensors="pt").to(device))


def _encoded(features: dict[str, Any], text: str, truncated: bool) -> Encoded:
    """An input, with spans if the tokenizer gave them among the ``features``."""
    offsets, mask = features.pop("offset_mapping", ()), features.pop("special_tokens_mask", ())
    return Encoded(features, truncated, Spans(text, offsets, mask))


def batches_by_length(
    lengths: Sequence[int], max_tokens: int | None = None, max_rows: int | None = None
) -> Iterator[list[int]]:
    """Yield indices of inputs of similar length.

    Args:
        lengths: of the inputs, in tokens.
        max_tokens: of a batch with its padding; a longer input makes a batch by itself.
        max_rows: of a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        is_full = max_rows is not None and len(batch) == max_rows
        if batch and (is_full or (max_tokens is not None and (len(batch) + 1) * lengths[index] > max_tokens)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of up to ``size`` items, so that memory stays bounded however many there are."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
