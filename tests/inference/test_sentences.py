"""Sentences of tokens as a model reads them: first pieces, windows, and what is put together from them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import transformers as hf
from tests.inference.test_token_tasks import save_pieces
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Collator
from sparsepeft.inference.portable import SplitText, entities_in, without_overlap
from sparsepeft.inference.sentences import SENTENCE, by_sentence, encode_sentences, first_pieces, windows_of
from sparsepeft.tasks.spec import TaskSpec, build_dataset

SENTENCES = [
    ["Zoë-Ann", "lives", "in", "New  York", "."],
    ["...", "the", "thing", "(", "sic", ")"],
    ["x"],
]
SPEC = TaskSpec("own", ("text",), ("O", "B-X", "I-X"), ("f1",), "f1", 1, labels_tokens=True)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_pieces(tmp_path_factory.mktemp("pieces")))


def byte_level() -> PreTrainedTokenizerBase:
    """As RoBERTa's and GPT-2's are; it knows single bytes and a few pairs."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[UNK]", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(tokens) for tokens in SENTENCES] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def test_pieces_are_those_of_split_words(wordpiece: PreTrainedTokenizerBase) -> None:
    for tokens, window in zip(SENTENCES, windows_of(wordpiece, SENTENCES, 64), strict=True):
        expected = wordpiece(tokens, is_split_into_words=True)
        assert window.features["input_ids"] == expected["input_ids"]
        words = expected.word_ids()
        firsts = [word if word != before else None for before, word in zip([None, *words], words, strict=False)]
        assert window.tokens == firsts
    # With the space before each word but the first one.
    plain, prefixed = byte_level(), byte_level()
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokens, window in zip(SENTENCES, windows_of(plain, SENTENCES, 64), strict=True):
        split = prefixed(tokens, is_split_into_words=True)
        after_first = [i for i, word in enumerate(split.word_ids()) if word]
        later = [piece for piece, token in zip(window.features["input_ids"], _of(window.tokens), strict=True) if token]
        assert later == [split["input_ids"][i] for i in after_first]


def _of(firsts: list[int | None]) -> list[int]:
    """The token of each piece, from those that are first."""
    tokens, current = [], 0
    for first in firsts:
        current = current if first is None else first
        tokens.append(current)
    return tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_sentences_are_read_in_windows(wordpiece: PreTrainedTokenizerBase, side: str) -> None:
    wordpiece.truncation_side = side
    long = [f"{'abc' * (i % 4 + 1)}" for i in range(40)]
    dataset = build_dataset(SPEC, [(long, [i % 3 for i in range(40)]), (["a"], [1])])
    rows, num_split, num_lost = encode_sentences(dataset, wordpiece, 16)
    assert (num_split, num_lost) == (1, 0)
    assert wordpiece.truncation_side == side
    assert max(rows["length"][:]) == 16
    labels, places = rows["labels"][:], rows[SENTENCE][:]
    logits = [np.eye(3)[np.maximum(row, 0)] for row in labels]
    found, true = by_sentence(logits, labels, places)
    assert true.shape == (2, 40)
    assert true[0].tolist() == [i % 3 for i in range(40)]
    assert true[1].tolist() == [1] + [-100] * 39
    assert found[true >= 0].argmax(-1).tolist() == true[true >= 0].tolist()
    # A later window begins with pieces that the one before has labels for.
    second = rows[1]
    assert second["labels"][1:4] == [-100] * 3
    assert rows[0]["input_ids"][-4:-1] == second["input_ids"][1:4]


def test_tokens_without_pieces_are_counted(wordpiece: PreTrainedTokenizerBase) -> None:
    bare = byte_level()
    bare.backend_tokenizer.normalizer = normalizers.Replace("€", "")
    encoded = encode_sentences(build_dataset(SPEC, [(["€", "a"], [1, 0]), (["€"], [2])]), bare, 8)
    assert encoded.notes(8) == ["tokens of which the tokenizer knows nothing, left out: 2"]
    assert min(encoded.rows["length"][:]) > 0
    with pytest.raises(UserError, match="CanineTokenizer, cannot tell where in a text"):
        encode_sentences(build_dataset(SPEC, [(["a"], [0])]), hf.CanineTokenizer(), 8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_are_padded_like_the_pieces(wordpiece: PreTrainedTokenizerBase, side: str) -> None:
    wordpiece.padding_side = side
    rows = encode_sentences(build_dataset(SPEC, [(["the", "a"], [0, 1]), (["a"], [2])]), wordpiece, 16).rows
    batch = Collator(wordpiece)([rows[0], rows[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} & set(batch))
    padding = [-100]
    short = [-100, 2, -100]
    assert batch["labels"].tolist() == [
        [-100, 0, 1, -100],
        short + padding if side == "right" else padding + short,
    ]


def test_first_pieces_where_a_piece_begins_with_the_space() -> None:
    # "New York": the second piece of each is within the token; SentencePiece has spaces in its pieces.
    assert first_pieces(["New", "York"], [(0, 2), (2, 3), (3, 6), (6, 8)]) == [0, None, 1, None]
    assert first_pieces(["a", "b"], [(0, 0), (0, 1), (1, 2), (2, 3)]) == [None, 0, 1, None]


def test_parts_with_bytes_of_one_character_keep_all_tokens() -> None:
    places = [(0, 0), (0, 1), (2, 3), (2, 3), (2, 3), (3, 4), (0, 0)]
    special, logits = [1, 0, 0, 0, 0, 0, 1], np.arange(14).reshape(7, 2)
    for stride in (0, 1, 2):
        first, second = slice(0, 4), slice(4 - stride, 7)
        parts = [(places[part], special[part], logits[part]) for part in (first, second)]
        offsets, rows = without_overlap(parts, stride)
        assert (offsets, rows.tolist()) == (places[1:-1], logits[1:-1].tolist())


def test_entities_by_word() -> None:
    text = "Zoë-Ann U.S. 北京  x Rom"
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    spans = [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 7),
        (7, 9),
        (9, 10),
        (10, 11),
        (11, 12),
        (13, 14),
        (14, 15),
        (15, 18),
        (18, 22),
    ]
    words = ["Zo", "ë", "-", "Ann", " U", ".", "S", ".", "北", "京", "  x", " Rom"]
    assert [text[start:end] for start, end in spans] == words
    guesses = [1, 3, 2, 2, 3, 4, 4, 4, 3, 4, 0, 3]  # "ë" is inside a word, where no piece is asked
    logits = 4 * np.eye(5)[guesses]
    found = entities_in(text, spans, logits, names, by_word=True)
    assert [(one.label, one.word, text[one.start : one.end]) for one in found] == [
        ("PER", "Zoë-Ann", "Zoë-Ann"),
        ("LOC", "U.S.", "U.S."),
        ("LOC", "北京", "北京"),
        ("LOC", "Rom", "Rom"),
    ]
    assert all(one.score == pytest.approx(np.exp(4) / (np.exp(4) + 4)) for one in found)
    every = entities_in(text, spans, logits, names, joined=False)
    assert [names.index(one.label) for one in every] == guesses
    text, spans = "O'Neil, (Bob)", [(0, 1), (1, 2), (2, 6), (6, 7), (8, 9), (9, 12), (12, 13)]
    logits = 4 * np.eye(5)[[1, 0, 3, 0, 0, 1, 0]]  # punctuation within a word is asked as little as its other pieces
    assert [one.word for one in entities_in(text, spans, logits, names, by_word=True)] == ["O'Neil", "Bob"]
    assert entities_in("", [], np.zeros((0, 5)), names, by_word=True) == ()
    given = pickle.loads(pickle.dumps(SplitText(["U.S.", "New York", ",", "U.S.A"])))  # as they go to other processes
    spans = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 13), (13, 15), (15, 17), (17, 18), (18, 21)]
    logits = 4 * np.eye(5)[[3, 0, 0, 0, 3, 0, 0, 3, 0, 0]]
    found = entities_in(given, spans, logits, names, by_word=True)
    assert [one.word for one in found] == ["U.S.", "New York", "U.S.A"]
    spans, guesses = [(0, 1), (1, 2), (2, 3)], np.eye(5)[[0, 1, 3]]  # a space of its own is the first piece of a token
    assert first_pieces(["a", "中"], spans) == [0, 1, None]
    for text in ("a 中", SplitText(["a", "中"])):
        assert [one.label for one in entities_in(text, spans, guesses, names, by_word=True)] == ["PER"]
    spans = [(0, 1), (1, 2), (2, 3), (2, 3), (3, 4)]  # a token's own white space, in bytes, after that between tokens
    assert first_pieces(["a", "\u3000x"], spans) == [0, 1, None, None, None]
    for given, label in ((SplitText(["a", "\u3000x"]), "PER"), ("a \u3000x", "PER")):
        found = entities_in(given, spans, np.eye(5)[[0, 1, 3, 4, 3]], names, by_word=True)
        assert [(one.label, one.word) for one in found] == [(label, "x")]
    for text, spans, words in (  # marks on a letter, with a piece of their own or unknown to a tokenizer
        ("नदी बड़ी", [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (7, 8)], ["नदी", "बड़ी"]),
        ("Jose\u0301 ran", [(0, 4), (4, 5), (6, 9)], ["Jose\u0301", "ran"]),
        ("Jose\u0301 ran", [(0, 4), (6, 9)], ["Jose\u0301", "ran"]),
        ("葛\U000e0100城", [(0, 1), (1, 2), (2, 3)], ["葛\U000e0100", "城"]),
        (SplitText(["Bob\u0301", "\u202eAnn\u200b"]), [(0, 3), (6, 9)], ["Bob\u0301", "\u202eAnn\u200b"]),
    ):
        found = entities_in(text, spans, np.eye(5)[[1] * len(spans)], names, by_word=True)
        assert [(one.word, text[one.start : one.end]) for one in found] == [(word, word) for word in words]
    found = entities_in("a b c", [(0, 1), (2, 3), (4, 5)], np.eye(3), ("B-O", "I-O", "O"), by_word=True)
    assert [(one.label, one.word) for one in found] == [("O", "a b")]  # a type of that name
    spans = [(0, 1), (0, 1), (1, 5), (6, 7)]  # bytes of a character have its place
    found = entities_in("école a", spans, np.eye(5)[[1, 3, 3, 0]], names, by_word=True, joined=False)
    assert [(one.label, one.word) for one in found] == [("B-PER", "école"), ("O", "a")]
    placed = entities_in("a b c", [(0, 1), (2, 3), (4, 5)], np.eye(3), ("S-X", "B-X", "E-X"), by_word=True)
    assert [(one.start, one.end) for one in placed] == [(0, 1), (2, 5)]
    placed = entities_in("a b c", [(0, 1), (2, 3), (4, 5)], np.eye(3), ("S-X", "I-X", "E-X"), by_word=True)
    assert [(one.start, one.end) for one in placed] == [(0, 1), (2, 5)]
