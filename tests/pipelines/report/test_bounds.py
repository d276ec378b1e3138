"""Intervals of shares end where shares end: two seeds that differ much leave a t interval that passes 0 and 1."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.report.analysis import _level, _test
from posttrain.evaluation.crossed import crossed_mean
from posttrain.evaluation.nearly_equal import clopper_pearson
from posttrain.evaluation.statistics import Resampling

DRAWS = Resampling(200, 0.95, 0)
PROMPTS = np.arange(100)
APART = np.stack([PROMPTS < 20, PROMPTS < 80], axis=1).astype(float)
"""Two seeds, with 20 and 80 % of right answers."""


def test_the_interval_of_a_share_lies_between_0_and_1() -> None:
    assert crossed_mean(APART).low < -1
    cut = _level(APART, DRAWS, None, 0.0)
    assert (cut.value, cut.low, cut.high) == (0.5, 0.0, 1.0)


def test_the_interval_of_a_difference_of_shares_lies_between_minus_1_and_1() -> None:
    found = _test(APART, 1 - APART[:, ::-1], DRAWS, 1, None, -1.0)
    assert (found.difference.low, found.difference.high) == (-1.0, 1.0)


@pytest.mark.parametrize("shape", [(24, 1), (1, 1), (24, 3)])
def test_prompts_that_are_all_solved_equally_often_leave_an_interval(shape: tuple[int, int]) -> None:
    found = _level(np.full(shape, 0.75), DRAWS, None, 0.0)
    assert (found.low, found.high) == pytest.approx(clopper_pearson(0.75 * shape[0], shape[0], 0.95))


def test_other_rewards_have_no_bounds() -> None:
    free = _level(APART, DRAWS, None, -math.inf)
    assert free.low == crossed_mean(APART).low < -1
