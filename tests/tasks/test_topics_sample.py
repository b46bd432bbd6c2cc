"""The built-in `topics` sample: sizes, balance, lengths, and no repeated or near-repeated texts."""

import json
import re
from collections import Counter
from importlib import resources
from itertools import groupby

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

LABELS = ("business", "health", "science", "sport", "travel")
SIZES = {"train": 300, "validation": 60, "test": 120}
MAX_SHARED_OPENING = 3  # texts that may begin with the same three words
MAX_LABEL_MENTIONS = 5  # texts that may contain a label word
MAX_COSINE = 0.3  # between any two texts, TF-IDF over words and word pairs


def read_raw(split: str) -> str:
    return (resources.files("sparsepeft.tasks") / "topics" / f"{split}.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {split: [json.loads(line) for line in read_raw(split).splitlines()] for split in SIZES}


@pytest.fixture(scope="module")
def texts(splits: dict[str, list[dict[str, str]]]) -> list[str]:
    return [row["text"] for rows in splits.values() for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


@pytest.mark.parametrize("split", SIZES)
def test_a_split_has_the_expected_size_and_equal_classes_in_shuffled_rows(splits, split):
    rows = splits[split]
    assert len(rows) == SIZES[split]
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS, SIZES[split] // len(LABELS))
    assert read_raw(split).endswith("}\n")
    for row in rows:
        assert set(row) == {"text", "label"}
        assert row["text"] == " ".join(row["text"].split())
    longest = max(len(list(run)) for _, run in groupby(row["label"] for row in rows))
    assert longest < SIZES[split] // len(LABELS)  # they are shuffled


def test_texts_have_15_to_45_words_and_differ_in_or_across_splits(texts):
    assert [text for text in texts if not 15 <= len(text.split()) <= 45] == []
    counts = Counter(" ".join(words(text)) for text in texts)
    assert [text for text, count in counts.items() if count > 1] == []
    openings = Counter(tuple(words(text)[:3]) for text in texts)
    assert [opening for opening, count in openings.items() if count > MAX_SHARED_OPENING] == []


def test_label_words_rarely_occur_in_the_texts(texts):
    label_words = {*LABELS, "sports", "sporting", "traveller", "travellers", "travelling", "scientific", "healthy"}
    assert sum(bool(label_words.intersection(words(text))) for text in texts) <= MAX_LABEL_MENTIONS


def test_no_two_texts_are_nearly_alike(texts):
    features = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(texts)
    cosine = (features @ features.T).toarray()
    np.fill_diagonal(cosine, 0.0)
    first, second = np.unravel_index(cosine.argmax(), cosine.shape)
    assert cosine.max() < MAX_COSINE, (texts[first], texts[second])
