"""How far texts that arrive are from those that a model was trained on: their lengths and their words.

Example:
    >>> training = ["add 1 and 2", "add 3 and 4", "add 5 and 6 and 7"] * 20
    >>> same, other = compare_texts(training, training), compare_texts(training, ["subtract two numbers"] * 30)
    >>> same.length_psi, same.new_words, other.new_words
    (0.0, 0.0, 1.0)
    >>> round(other.length_psi, 1), round(other.chance, 1)
    (17.8, 0.3)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10
_EMPTY = 1e-4
"""Share that an empty bin counts as, so that the logarithm is finite."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TextDrift:
    """Texts compared with training texts.

    Attributes:
        texts: how many were compared.
        length_psi: population stability index of the lengths in characters. Usual reading: below 0.1 small, above 0.25 large.
        chance: 95 % quantile of the index for so many texts without any drift.
        new_words: share of the words that no training text has.
        known: share of the texts that are training texts, word for word.
    """

    texts: int
    length_psi: float
    chance: float
    new_words: float
    known: float


def compare_texts(training: Sequence[str], texts: Sequence[str]) -> TextDrift:
    """Compare texts with training texts. Raises ValueError if one of the two is empty."""
    if not training or not texts:
        raise ValueError("drift needs texts on both sides")
    seen = {word.lower() for text in training for word in _WORD.findall(text)}
    words = [word.lower() for text in texts for word in _WORD.findall(text)]
    index, bins = stability_index([len(text) for text in training], [len(text) for text in texts])
    known = set(training)
    return TextDrift(
        len(texts),
        index,
        chance_limit(bins, len(training), len(texts)),
        sum(word not in seen for word in words) / len(words) if words else 0.0,
        sum(text in known for text in texts) / len(texts),
    )


def stability_index(expected: Sequence[float], actual: Sequence[float]) -> tuple[float, int]:
    """Return the population stability index sum (a - e) ln(a / e) over bins, and the number of bins.

    The bins are the deciles of `expected`; equal deciles are merged. a and e are the shares of each side in a bin.
    """
    inner = np.unique(np.quantile(np.asarray(expected, float), np.arange(1, BINS) / BINS))
    shares = [
        np.bincount(np.searchsorted(inner, side), minlength=len(inner) + 1) / len(side) for side in (expected, actual)
    ]
    e, a = (np.maximum(share, _EMPTY) for share in shares)
    return float(np.sum((a - e) * np.log(a / e))), len(inner) + 1


def chance_limit(bins: int, expected: int, actual: int, level: float = 0.95) -> float:
    """Return the quantile of the index if both sides have one distribution: (1/n + 1/m) chi2(bins - 1), to first order."""
    from scipy.stats import chi2  # not above: it takes half a second, and a flow imports this module only for its types

    return float((1 / expected + 1 / actual) * chi2.ppf(level, bins - 1)) if bins > 1 else 0.0
