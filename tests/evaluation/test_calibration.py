"""Calibration of a reward model and its rank correlation with graded scores, by hand."""

from __future__ import annotations

import math
import random

import pytest

from posttrain.evaluation.calibration import calibration_curve, calibration_error, rank_correlation


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_error_is_the_distance_weighed_by_the_pairs() -> None:
    # confidences .5 (a tie), .525, .731, .731, .999; ten bins of width .05 from .5
    gaps = [0.0, -0.1, 1.0, -1.0, 7.0]
    curve = calibration_curve(gaps)
    assert [b.count for b in curve] == [2, 2, 1]
    assert [b.accuracy for b in curve] == [0.25, 0.5, 1.0]
    assert [b.confidence for b in curve] == pytest.approx([(0.5 + sigma(0.1)) / 2, sigma(1.0), sigma(7.0)])
    expected = (2 * (curve[0].confidence - 0.25) + 2 * (sigma(1.0) - 0.5) + 1 - sigma(7.0)) / 5
    assert calibration_error(curve) == pytest.approx(expected, abs=1e-12)


def test_a_model_that_means_its_scores_is_calibrated_and_one_that_doubles_them_is_not() -> None:
    rng = random.Random(0)
    true = [abs(rng.gauss(0, 1.5)) for _ in range(40_000)]
    gaps = [gap if rng.random() < sigma(gap) else -gap for gap in true]
    assert calibration_error(calibration_curve(gaps)) < 0.01
    assert calibration_error(calibration_curve([2 * gap for gap in gaps])) > 0.05


def test_an_extreme_gap_is_in_the_last_bin() -> None:
    (only,) = calibration_curve([800.0, -800.0])
    assert (only.count, only.confidence, only.accuracy) == (2, 1.0, 0.5)


def test_tied_values_share_their_mean_rank() -> None:
    # ranks 1.5 1.5 3 4 and 2 1 3 4: covariance 4.5, variances 4.5 and 5
    assert rank_correlation([1, 1, 2, 9], [5, 4, 6, 7]) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-12)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
