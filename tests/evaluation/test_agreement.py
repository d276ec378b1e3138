"""Agreement of annotators against sums by hand and Krippendorff's published example."""

from __future__ import annotations

import pytest

from posttrain.evaluation.agreement import cohen_kappa, interval, krippendorff_alpha


def test_alpha_of_two_annotators_by_hand() -> None:
    units = [["a", "a"], ["b", "b"], ["a", "a"], ["a", "b"]]
    # observed: 2 of 8 ordered pairs disagree. Expected: 5 a and 3 b, so 2 x 15 of 8 x 7 ordered pairs
    assert krippendorff_alpha(units) == pytest.approx(1 - (2 / 8) / (30 / 56))
    # an item with one label has no pair and changes nothing
    assert krippendorff_alpha([*units, ["c"]]) == krippendorff_alpha(units)


def test_alpha_of_krippendorffs_example_with_missing_labels() -> None:
    """Reproduce the four coders of Krippendorff (2011): alpha is 0.743 for nominal and 0.849 for interval data."""
    rows = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    }
    units = [[row[i] for row in rows.values() if row[i] is not None] for i in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, interval) == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_undefined_without_disagreement_by_chance() -> None:
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None


def test_kappa_by_hand() -> None:
    pairs = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    # observed 35/50; by chance 25/50 x 30/50 + 25/50 x 20/50 = 1/2
    assert cohen_kappa(pairs) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohen_kappa([("a", "a")]) is None
    assert cohen_kappa([]) is None
