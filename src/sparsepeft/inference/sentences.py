"""Sentences of tokens for a model that reads pieces: the first piece of a token stands for it."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparsepeft.errors import UserError
from sparsepeft.inference.portable import shared_tokens
from sparsepeft.tasks.token_metrics import NO_TOKEN

if TYPE_CHECKING:
    from datasets import Dataset

SENTENCE = "sentence"  # the column that says which sentence a row belongs to


class Window(NamedTuple):
    """A sentence, or a part of one that is longer than the model takes.

    Attributes:
        sentence: its place among those that were given.
        features: what the model reads.
        tokens: by piece, the token of which it is the first; None for other pieces, and for tokens that the window
            before has.
    """

    sentence: int
    features: dict[str, list[int]]
    tokens: list[int | None]


class EncodedSentences(NamedTuple):
    """Sentences with tags, ready for a model.

    Attributes:
        rows: one for each window: ``input_ids``, ..., ``labels`` (a class for each piece, or -100), ``length`` and
            :data:`SENTENCE`.
        num_split: sentences that needed more than one window.
        num_lost: tokens of which the tokenizer makes no piece, such as control characters; they are not in ``rows``.
    """

    rows: Dataset
    num_split: int
    num_lost: int

    def notes(self, max_length: int) -> list[str]:
        """What a reader of the scores should know."""
        split = f"sentences longer than {max_length} tokens, read in parts: {self.num_split:,}"
        lost = f"tokens of which the tokenizer knows nothing, left out: {self.num_lost:,}"
        return [*([split] if self.num_split else []), *([lost] if self.num_lost else [])]


def overlap(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many pieces neighbouring windows of ``max_length`` share, see :func:`shared_tokens`."""
    return shared_tokens(max_length - tokenizer.num_special_tokens_to_add())


def check_fast(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """See that a tokenizer can tell where in a text its tokens are.

    Raises:
        UserError: it cannot; ``what`` needs it.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{what}, but the tokenizer, {type(tokenizer).__name__}, cannot tell where in a text they are; pass a "
            "fast one, such as AutoTokenizer.from_pretrained gives where the library tokenizers knows the model."
        )


def windows_of(tokenizer: PreTrainedTokenizerBase, sentences: Iterable[Sequence[str]], max_length: int) -> list[Window]:
    """Encode sentences, in windows of at most ``max_length`` pieces where they are longer.

    A sentence is encoded as a text with a space between its tokens, which is how any other text is read later. For
    WordPiece and SentencePiece that gives the pieces that ``is_split_into_words`` does; byte-level tokenizers (RoBERTa,
    GPT-2) see the space before each token but the first without ``add_prefix_space``.

    Args:
        tokenizer: a fast one, see :func:`check_fast`.
        sentences: of tokens.
        max_length: above the number of special tokens.
    """
    sentences, side = list(sentences), tokenizer.truncation_side
    tokenizer.truncation_side = "right"  # so that a sentence's windows come in its order
    try:
        encoded: dict[str, Any] = dict(
            tokenizer(
                [" ".join(tokens) for tokens in sentences],
                truncation=True,
                max_length=max_length,
                stride=overlap(tokenizer, max_length),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        )
    finally:
        tokenizer.truncation_side = side
    rows, offsets, special = (
        encoded.pop(name) for name in ("overflow_to_sample_mapping", "offset_mapping", "special_tokens_mask")
    )
    found, known = [], [set[int]() for _ in sentences]
    for row, sentence in enumerate(rows):
        places = [(0, 0) if is_special else place for place, is_special in zip(offsets[row], special[row], strict=True)]
        firsts = first_pieces(sentences[sentence], places, known[sentence])
        found.append(Window(sentence, {name: values[row] for name, values in encoded.items()}, firsts))
    return found


def first_pieces(
    tokens: Sequence[str], offsets: Sequence[tuple[int, int]], known: set[int] | None = None
) -> list[int | None]:
    """The token that each piece is the first of, None for others.

    Args:
        tokens: of a sentence.
        offsets: of the pieces in its text, the tokens with a space between; empty ones belong to none.
        known: tokens that are passed over; those found are added.
    """
    known = set() if known is None else known
    # A piece belongs to the token in which it ends: some tokenizers have the space before a token in its first piece.
    ends = list(itertools.accumulate((len(token) + 1 for token in tokens), initial=-1))[1:]
    firsts: list[int | None] = []
    for start, end in offsets:
        token = bisect_right(ends, end - 1)
        is_first = start < end and token not in known
        firsts.append(token if is_first else None)
        if is_first:
            known.add(token)
    return firsts


def encode_sentences(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSentences:
    """Token ids and labels of every sentence of a task that labels tokens.

    Raises:
        UserError: the tokenizer is a slow one.
    """
    check_fast(tokenizer, "The task labels tokens")
    num_split = num_lost = 0

    def encode(batch: dict[str, list], places: list[int]) -> dict[str, Any]:
        nonlocal num_split, num_lost
        windows = [one for one in windows_of(tokenizer, batch["tokens"], max_length) if one.tokens]
        num_split += len({one.sentence for one, other in itertools.pairwise(windows) if one.sentence == other.sentence})
        num_lost += sum(map(len, batch["tokens"])) - sum(t is not None for one in windows for t in one.tokens)
        tags = batch["label"]
        return {
            **{name: [one.features[name] for one in windows] for name in (windows[0].features if windows else ())},
            "labels": [
                [NO_TOKEN if token is None else tags[one.sentence][token] for token in one.tokens] for one in windows
            ],
            "length": [len(one.tokens) for one in windows],
            SENTENCE: [places[one.sentence] for one in windows],
        }

    rows = dataset.map(
        encode, batched=True, with_indices=True, remove_columns=dataset.column_names, keep_in_memory=True
    )
    return EncodedSentences(rows, num_split, num_lost)


def by_sentence(
    logits: Iterable[np.ndarray], labels: Iterable[Sequence[int]], sentences: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What windows say about their tokens, put together to sentences.

    Args:
        logits: (T, C) of each window, with padding or without.
        labels: (T,) of each, -100 for what is no token.
        sentences: to which each belongs; the windows of a sentence come in its order.

    Returns:
        Logits (N, W, C) and labels (N, W) of the tokens, with -100 behind sentences that are shorter than the longest.
    """
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for values, tags, sentence in zip(logits, labels, sentences, strict=True):
        is_token = np.asarray(tags) != NO_TOKEN
        found.setdefault(sentence, []).append((np.asarray(values)[is_token], np.asarray(tags)[is_token]))
    joined = [tuple(map(np.concatenate, zip(*parts, strict=True))) for _, parts in sorted(found.items())]
    width = max((len(tags) for _, tags in joined), default=0)
    all_logits = np.zeros((len(joined), width, joined[0][0].shape[-1]), dtype=np.float32)
    all_labels = np.full((len(joined), width), NO_TOKEN)
    for row, (values, classes) in enumerate(joined):
        all_logits[row, : len(classes)], all_labels[row, : len(classes)] = values, classes
    return all_logits, all_labels
