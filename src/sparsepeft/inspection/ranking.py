"""Which words a parent prefers: a test, and which words say nothing about a topic."""

from __future__ import annotations

import functools

import numpy as np

from sparsepeft.extras import require

MIN_Z = 2.0
COMMON_SHARE = 0.5  # a word in more than this share of the texts says nothing about any of them, in any language

# What scikit-learn's list has beside function words.
_TOPICAL = {
    *("amount", "bill", "bottom", "call", "cry", "describe", "detail", "fill", "fire", "front", "full", "interest"),
    *("mill", "mine", "name", "serious", "side", "sincere", "system", "thick", "thin", "top"),
}
_MARKS = "#Ġ▁"  # with which tokenizers mark the beginning or the middle of a word


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
