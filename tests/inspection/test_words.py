"""Words behind positions, and what parents fire on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparsepeft.inspection import Words, encode_with_words, token_words
from sparsepeft.inspection.words import MIN_Z, WordCounts, log_odds_z


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


def counted(*parents: dict[str, int]) -> WordCounts:
    """A memory whose parents have met so many of each word, every occurrence in a text of its own."""
    counts = WordCounts(num_memories=1, num_parents=len(parents))
    times = [(word, parent, count) for parent, words in enumerate(parents) for word, count in words.items()]
    met = [(word, parent) for word, parent, count in times for _ in range(count)]
    positions = np.arange(len(met))
    words = Words([word for word, _ in met], positions[:, None])
    counts.add(0, words, positions, np.array([parent for _, parent in met]))
    return counts


def test_z_is_that_of_monroe_colaresi_and_quinn() -> None:
    ours, others = np.array([30, 4, 0, 1, 0]), np.array([10, 4, 20, 0, 0])
    prior = [4 * (a + b) / 69 for a, b in zip(ours, others, strict=True)]
    for word, z in enumerate(log_odds_z(ours, others)[:4]):
        a, b = ours[word] + prior[word], others[word] + prior[word]
        odds = math.log(a / (35 + 4 - a)) - math.log(b / (34 + 4 - b))
        assert z == pytest.approx(odds / math.sqrt(1 / a + 1 / b))
    assert log_odds_z(ours, others) == pytest.approx(-log_odds_z(others, ours))
    assert log_odds_z(ours, others)[4] == 0
    assert not log_odds_z(ours, np.zeros(5, dtype=np.int64)).any()


def test_words_are_ranked_by_evidence_not_by_lift() -> None:
    counts = counted({"goal": 60, "once": 1, "rare": 20, "even": 50}, {"goal": 20, "tax": 60, "even": 50})
    found = counts.top(0, 0, 10, min_count=1)
    assert [(word, count) for word, count, _, _ in found] == [("goal", 60), ("rare", 20)]
    assert found[0][2] == pytest.approx(60 / 131 / (80 / 261))
    assert found[0][3] > found[1][3] >= MIN_Z
    assert found[0][2] < found[1][2]
    assert [word for word, *_ in counts.top(0, 1, 10, min_count=1)] == ["tax"]
    assert [word for word, *_ in counts.top(0, 0, 1, min_count=1)] == ["goal"]
    assert [word for word, *_ in counts.top(0, 0, 10, min_count=21)] == ["goal"]


def test_what_says_nothing_is_left_out_unless_asked_for() -> None:
    empty = {"the": 40, ",": 40, "2004": 40, "s": 40, "▁und": 1}
    counts = counted({**empty, "fire": 40, "Фильм": 40, "猫": 40}, {"tax": 400, "of": 9})
    assert {word for word, *_ in counts.top(0, 0, 20, 5)} == {"fire", "Фильм", "猫"}
    assert {"the", ",", "2004", "s"} <= {word for word, *_ in counts.top(0, 0, 20, 5, keep_stop_words=True)}


def test_a_word_of_most_texts_says_nothing_in_any_language() -> None:
    counts = WordCounts(1, 2)
    texts = [*("und", "tor") * 3, "und", "steuer"] * 10
    occurrence = np.arange(80).reshape(40, 2)  # 40 texts of two words; 30 have a goal, 10 a tax
    counts.add(0, Words(texts, occurrence), np.arange(80), np.array(([0, 0] * 3 + [1, 1]) * 10))
    assert [word for word, *_ in counts.top(0, 1, 5, 1)] == ["steuer"]
    assert [word for word, *_ in counts.top(0, 0, 5, 1)] == []
    assert [word for word, *_ in counts.top(0, 0, 5, 1, keep_stop_words=True)] == ["tor"]


def test_a_word_goes_to_the_parent_of_most_of_its_pieces() -> None:
    counts = WordCounts(1, 3)
    occurrence = np.array([[0, 0, 0, 1, 1, -1]])
    positions = np.array([0, 1, 2, 3, 4, 5])
    counts.add(0, Words(["three", "two"], occurrence), positions, np.array([2, 1, 2, 2, 1, 0]))
    assert counts._counts[0, :2].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_rare_words_are_forgotten_and_the_table_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = WordCounts(1, 2)
    monkeypatch.setattr(counts, "_max_words", 4)
    for batch in range(300):
        texts = ["often", "usual", *(f"rare{batch}-{i}" for i in range(8))]
        positions = np.arange(len(texts))
        counts.add(0, Words(texts, positions[None]), positions, np.zeros(len(texts), dtype=np.int64))
        counts.shrink()
        assert len(counts._index) <= 4
    assert counts.has_forgotten
    assert {word: counts._counts[0, i].tolist() for word, i in counts._index.items()}["often"] == [300, 0]
    assert counts._texts[counts._index["usual"]] == 300
    counts = WordCounts(1, 2)
    texts = [f"word{i}" for i in range(3000)]
    positions = np.arange(3000)
    counts.add(0, Words(texts, positions[None]), positions, positions % 2)
    assert counts._counts[0].sum(0).tolist() == [1500, 1500]
    assert counts._texts.sum() == 3000
