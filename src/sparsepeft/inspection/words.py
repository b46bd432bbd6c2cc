"""Whole words behind token positions, how often each parent met them, and which of them it prefers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sparsepeft.extras import require

# Entries of the table of counts; the rarest words are forgotten when it is full.
_MAX_ENTRIES = 1 << 24

MIN_Z = 2.0
COMMON_SHARE = 0.5  # a word in more than this share of the texts says nothing about any of them, in any language
# What scikit-learn's list has beside function words.
_TOPICAL = {
    *("amount", "bill", "bottom", "call", "cry", "describe", "detail", "fill", "fire", "front", "full", "interest"),
    *("mill", "mine", "name", "serious", "side", "sincere", "system", "thick", "thin", "top"),
}
_MARKS = "#Ġ▁"  # with which tokenizers mark the beginning or the middle of a word


@dataclass(frozen=True)
class Words:
    """The words of a batch, piece by piece.

    Attributes:
        texts: each occurrence of a word, in order.
        occurrence: which of them a position belongs to, (B, T); -1 for padding and special tokens.
    """

    texts: list[str]
    occurrence: np.ndarray


def encode_with_words(
    tokenizer: PreTrainedTokenizerBase, *columns: Sequence[str], max_length: int | None = None
) -> dict[str, Any]:
    """A padded batch of texts (or pairs of texts) with its words under ``"words"``.

    Args:
        tokenizer: a fast one rebuilds whole words; a slow one leaves tokens.
        columns: the texts, and for pairs the second texts, B each.
        max_length: longer inputs are cut.

    Returns:
        Tensors (B, T) by the model's input names, and ``"words"``, a :class:`Words`.
    """
    encoded = tokenizer(
        *(list(column) for column in columns),
        truncation=max_length is not None,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    words = _whole_words(encoded, columns, tokenizer) if encoded.is_fast else token_words(tokenizer, encoded.input_ids)
    return {**encoded, "words": words}


def token_words(tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> Words:
    """Every token as a word of its own, special tokens left out; ``input_ids`` is (B, T)."""
    ids = input_ids.cpu().numpy()
    is_word = ~np.isin(ids, np.array(sorted(tokenizer.all_special_ids), dtype=np.int64))
    occurrence = np.full(ids.shape, -1, dtype=np.int64)
    occurrence[is_word] = np.arange(is_word.sum())
    return Words([str(token) for token in tokenizer.convert_ids_to_tokens(ids[is_word].tolist())], occurrence)


def _whole_words(encoded: BatchEncoding, columns: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Words:
    """Pieces that the tokenizer counts to one word and that no white space separates (some do not split at it)."""
    texts: list[str] = []
    occurrence = np.full(tuple(encoded["input_ids"].shape), -1, dtype=np.int64)
    for row in range(len(occurrence)):
        word_ids, sequences = encoded.word_ids(row), encoded.sequence_ids(row)
        offsets = (encoded.encodings or [])[row].offsets
        previous: tuple[int | None, int | None] = (None, None)
        start = end = 0
        for position, (word, sequence) in enumerate(zip(word_ids, sequences, strict=True)):
            if word is None or sequence is None:
                previous = (None, None)
                continue
            text, (begin, stop) = columns[sequence][row], offsets[position]
            apart = text[end:stop] != text[end:stop].lstrip()
            if (word, sequence) != previous or apart:
                texts.append("")
                start = begin
            previous, end = (word, sequence), stop
            texts[-1] = text[start:stop]
            occurrence[row, position] = len(texts) - 1
    return Words([_as_read(text, tokenizer) for text in texts], occurrence)


def _as_read(word: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The word as the model sees it: in lower case where the tokenizer writes it so."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    normalized = normalizer.normalize_str(word) if normalizer is not None else word
    return str(normalized).replace("▁", " ").strip()


class WordCounts:
    """How many occurrences of each word went to each parent of each memory.

    An occurrence goes to the parent that most of its pieces have as their first (the lowest index of several). Memory
    is bounded: when the table is full, the rarer half of the words is forgotten.

    Args:
        num_memories: M.
        num_parents: P.
    """

    def __init__(self, num_memories: int, num_parents: int) -> None:
        self._max_words = max(1000, _MAX_ENTRIES // (num_memories * num_parents))
        self._index: dict[str, int] = {}
        self._counts = np.zeros((num_memories, 1024, num_parents), dtype=np.int64)  # (M, words, P)
        self._totals = np.zeros((num_memories, num_parents), dtype=np.int64)
        self._texts = np.zeros(1024, dtype=np.int64)  # that have the word
        self._num_texts = 0
        self.has_forgotten = False

    def add(self, memory: int, words: Words, positions: np.ndarray, parents: np.ndarray) -> None:
        """Count a batch.

        Args:
            memory: which memory, 0 to M - 1.
            positions: flat indices into ``words.occurrence`` of the positions that count, (N,).
            parents: the first parent of each, (N,).
        """
        num_parents = self._totals.shape[1]
        occurrences = words.occurrence.reshape(-1)[positions]
        is_word = occurrences >= 0
        # A vote is a number: occurrence * P + parent. Sorted by occurrence, then votes, then parent, the first wins.
        votes, counts = np.unique(occurrences[is_word] * num_parents + parents[is_word], return_counts=True)
        votes = votes[np.lexsort((votes, -counts, votes // num_parents))]
        voted, first = np.unique(votes // num_parents, return_index=True)
        winners = votes[first] % num_parents
        known = np.array([self._index_of(words.texts[occurrence]) for occurrence in voted], dtype=np.int64)
        np.add.at(self._counts[memory], (known, winners), 1)
        np.add.at(self._totals[memory], winners, 1)
        if memory == 0:
            _, first = np.unique(occurrences[is_word], return_index=True)
            rows = positions[is_word][first] // words.occurrence.shape[1]
            self._num_texts += len(np.unique(rows))
            np.add.at(self._texts, np.unique(np.stack([rows, known]), axis=1)[1], 1)

    def shrink(self) -> None:
        """Forget the rarer half of the words if there are too many; to be called between batches."""
        if len(self._index) <= self._max_words:
            return
        words = list(self._index)
        counts = self._counts[:, : len(words)]
        kept = np.sort(np.argsort(-counts.sum((0, 2)), kind="stable")[: self._max_words // 2])
        self._counts[:, : len(kept)] = counts[:, kept]
        self._counts[:, len(kept) :] = 0
        self._texts[: len(kept)] = self._texts[kept]
        self._texts[len(kept) :] = 0
        self._index = {words[old]: new for new, old in enumerate(kept)}
        self.has_forgotten = True

    def top(
        self, memory: int, parent: int, num_words: int, min_count: int, keep_stop_words: bool = False
    ) -> list[tuple[str, int, float, float]]:
        """The words that a parent meets more than the others do, by :func:`log_odds_z`.

        Args:
            num_words: at most so many.
            min_count: occurrences at this parent that a word needs.
            keep_stop_words: also list what :func:`is_topical` is not, and words of most texts.

        Returns:
            (word, occurrences at this parent, lift, z), by z; z is at least :data:`MIN_Z`. Lift is the word's share
            among the parent's words over its share among all.
        """
        names = list(self._index)
        counts = self._counts[memory, : len(names)]  # (words, P)
        ours, everywhere = counts[:, parent], counts.sum(1)
        z = log_odds_z(ours, everywhere - ours)
        rows = np.flatnonzero((ours >= max(1, min_count)) & (z >= MIN_Z))
        if not keep_stop_words:
            common = COMMON_SHARE * self._num_texts
            rows = np.array([i for i in rows if self._texts[i] <= common and is_topical(names[i])], dtype=np.int64)
        rows = rows[np.argsort(-z[rows], kind="stable")][:num_words]
        share = ours[rows] / max(1, self._totals[memory, parent])
        lift = share / (everywhere[rows] / max(1, self._totals[memory].sum()))
        return [(names[i], int(ours[i]), float(up), float(z[i])) for i, up in zip(rows, lift, strict=True)]

    def _index_of(self, word: str) -> int:
        index = self._index.setdefault(word, len(self._index))
        if index >= self._counts.shape[1]:
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
            self._texts = np.concatenate([self._texts, np.zeros_like(self._texts)])
        return index


def log_odds_z(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    r"""How surely each word is more frequent in one corpus than in another, as a z score.

    The log-odds ratio with an informative Dirichlet prior of Monroe, Colaresi and Quinn, *Fightin' Words* (Political
    Analysis 16(4), 2008), equations 15, 16, 20 and 22:

        z_w = d_w / sqrt(1 / (y_w + a_w) + 1 / (y'_w + a_w))
        d_w = log((y_w + a_w) / (n + a_0 - y_w - a_w)) - log((y'_w + a_w) / (n' + a_0 - y'_w - a_w))

    y and y' are the two corpora's counts, n and n' their sums. The prior has each word's share of both together,
    a_w = a_0 (y_w + y'_w) / (n + n'), and as many pseudo-occurrences a_0 as there are different words. A word that is
    rare in both has little evidence and a small z, however uneven it is.

    Args:
        ours: y, (W,).
        others: y', (W,).

    Returns:
        z, (W,); 0 for words that neither has, and where one corpus is empty.
    """
    both = (ours + others).astype(np.float64)
    known = both > 0
    z = np.zeros(len(both))
    if not (ours.any() and others.any()):
        return z
    total = float(known.sum())
    prior = total * both[known] / both.sum()
    y, z_y = ours[known] + prior, others[known] + prior
    odds = np.log(y / (ours.sum() + total - y)) - np.log(z_y / (others.sum() + total - z_y))
    z[known] = odds / np.sqrt(1 / y + 1 / z_y)
    return z


def is_topical(word: str) -> bool:
    """Whether a word can say what a text is about: no punctuation, number, single letter or English function word."""
    bare = word.lstrip(_MARKS).casefold()
    if not any(character.isalpha() for character in bare):
        return False
    is_letter = len(bare) == 1 and bare.upper() != bare  # scripts without capitals have words of one character
    return not is_letter and bare not in _stop_words()


@functools.cache
def _stop_words() -> frozenset[str]:
    words = require("sklearn.feature_extraction.text", "train", "Ranking words").ENGLISH_STOP_WORDS
    return frozenset(words - _TOPICAL)
