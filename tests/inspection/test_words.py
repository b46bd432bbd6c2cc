"""Words behind positions, and what parents fire on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparsepeft.inspection import Words, encode_with_words, token_words
from sparsepeft.inspection.words import WordCounts


def tokenizer(pieces: list[str], **parts: Any) -> hf.PreTrainedTokenizerFast:
    vocabulary = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(made, name, part)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bert_like() -> hf.PreTrainedTokenizerFast:
    pieces = ["strik", "##er", "##s", "score", "##d", "a", "goal", "."]
    return tokenizer(pieces, normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer())


def test_whole_words_as_the_model_reads_them() -> None:
    batch = encode_with_words(bert_like(), ["Strikers scored.", "A goal"])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["words"].texts == ["strikers", "scored", ".", "a", "goal"]
    assert batch["words"].occurrence.tolist() == [[-1, 0, 0, 0, 1, 1, 2, -1], [-1, 3, 4, -1, -1, -1, -1, -1]]


def test_pairs_and_cut_texts() -> None:
    batch = encode_with_words(bert_like(), ["goal goal"], ["goal"])
    assert batch["words"].texts == ["goal"] * 3
    assert batch["words"].occurrence.tolist() == [[-1, 0, 1, -1, 2, -1]]
    assert encode_with_words(bert_like(), ["a goal a goal"], max_length=4)["words"].texts == ["a", "goal"]


def test_a_tokenizer_that_does_not_split_at_white_space() -> None:
    vocabulary = {"<pad>": 0, "<unk>": 1, "▁a": 2, "▁go": 3, "al": 4}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_tokens(["▁a", "▁go", "al"])
    made.decoder = decoders.Metaspace()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    assert encode_with_words(fast, ["a goal a"])["words"].texts == ["a", "goal", "a"]


def test_tokens_of_a_slow_tokenizer() -> None:
    ids = bert_like()(["strikers"], return_tensors="pt").input_ids
    found = token_words(bert_like(), ids)
    assert found.texts == ["strik", "##er", "##s"]
    assert found.occurrence.tolist() == [[-1, 0, 1, 2, -1]]


def test_lift_by_hand() -> None:
    """Parent 0 meets goal 3 times and tax once, parent 1 goal once and tax 3 times and rate once."""
    counts = WordCounts(num_memories=2, num_parents=2)
    texts = ["goal"] * 3 + ["tax"] + ["goal"] + ["tax"] * 3 + ["rate"]
    positions = np.arange(9)
    parents = np.array([0] * 4 + [1] * 5)
    counts.add(1, Words(texts, positions[None]), positions, parents)
    assert counts.top(1, 0, 10, min_count=1) == [
        ("goal", 3, pytest.approx(3 / 4 / (4 / 9))),
        ("tax", 1, pytest.approx(1 / 4 / (4 / 9))),
    ]
    assert [word for word, _, _ in counts.top(1, 1, 10, min_count=1)] == ["rate", "tax", "goal"]
    assert [word for word, _, _ in counts.top(1, 1, 10, min_count=2)] == ["tax"]
    assert [word for word, _, _ in counts.top(1, 1, 1, min_count=1)] == ["rate"]
    assert counts.top(0, 0, 10, min_count=1) == []


def test_a_word_goes_to_the_parent_of_most_of_its_pieces() -> None:
    counts = WordCounts(1, 3)
    occurrence = np.array([[0, 0, 0, 1, 1, -1]])
    positions = np.array([0, 1, 2, 3, 4, 5])
    counts.add(0, Words(["three", "two"], occurrence), positions, np.array([2, 1, 2, 2, 1, 0]))
    assert [counts.top(0, parent, 5, 1) for parent in range(3)] == [[], [("two", 1, 2.0)], [("three", 1, 2.0)]]


def test_rare_words_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = WordCounts(1, 2)
    monkeypatch.setattr(counts, "_max_words", 4)
    for batch in range(300):
        texts = ["often", "usual", *(f"rare{batch}-{i}" for i in range(8))]
        positions = np.arange(len(texts))
        counts.add(0, Words(texts, positions[None]), positions, np.zeros(len(texts), dtype=np.int64))
        counts.shrink()
        assert len(counts._index) <= 4
    assert counts.has_forgotten
    assert [(word, count) for word, count, _ in counts.top(0, 0, 5, 1)][:2] == [("often", 300), ("usual", 300)]


def test_the_table_grows() -> None:
    counts = WordCounts(1, 2)
    texts = [f"word{i}" for i in range(3000)]
    positions = np.arange(3000)
    counts.add(0, Words(texts, positions[None]), positions, positions % 2)
    assert len(counts.top(0, 1, 5000, 1)) == 1500
