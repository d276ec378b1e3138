"""The drift of texts, against sums that are written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.evaluation.drift import chance_limit, compare_texts, stability_index


def test_the_index_is_the_sum_over_deciles() -> None:
    expected = list(range(100))
    # all of the second half: five empty bins, and five with twice the share
    index, bins = stability_index(expected, list(range(50, 100)))
    assert bins == 10
    assert index == pytest.approx(5 * (0.1 - 1e-4) * math.log(0.1 / 1e-4) + 5 * 0.1 * math.log(2))
    assert stability_index(expected, expected)[0] == 0.0
    # one length only: one decile, one bin above it
    assert stability_index([7] * 10, [7] * 3) == (0.0, 2)


def test_without_drift_the_index_stays_below_the_chance_limit_about_95_times_in_100() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    reference = random.normal(size=4000)
    limit = chance_limit(10, 4000, 200)
    above = sum(stability_index(reference, random.normal(size=200))[0] > limit for _ in range(400))
    assert 8 <= above <= 36, "20 are expected"


def test_words_and_known_texts_are_shares() -> None:
    found = compare_texts(["Add 1 and 2", "add 3"], ["add 1", "ADD 9 please", "add 3"])
    # add 1 add 9 please add 3: two of seven words are new, one of three texts is known
    assert found.new_words == pytest.approx(2 / 7)
    assert found.known == pytest.approx(1 / 3)
    assert found.texts == 3
    assert compare_texts(["a"], ["?!"]).new_words == 0.0
    with pytest.raises(ValueError, match="both sides"):
        compare_texts([], ["a"])
