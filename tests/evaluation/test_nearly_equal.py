"""Intervals of values that are equal or nearly so: by hand, and the coverage of the truth by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from posttrain.errors import DataError
from posttrain.evaluation.crossed import crossed_contrast, crossed_difference, crossed_mean
from posttrain.evaluation.nearly_equal import FEW, NEARLY_EQUAL, bounded_limits, clopper_pearson, limits
from posttrain.evaluation.statistics import Resampling, bootstrap, mean_interval, paired

DRAWS = Resampling(400, 0.95, 0)
EQUAL = np.full((24, 1), 2.5)
GROUPS = np.repeat(np.arange(6), 4)


def test_limits_of_equal_values_by_hand() -> None:
    # nothing of 24 seen: 1 - (1 - upper)^24 = 0.975; everything seen: the mirror image
    upper = 1 - 0.025 ** (1 / 24)
    assert bounded_limits(np.zeros(24), 0.95, 0.0) == (0.0, pytest.approx(upper))
    assert bounded_limits(np.ones(24), 0.95, 0.0) == (pytest.approx(1 - upper), 1.0)
    assert bounded_limits(np.zeros(24), 0.95, -1.0) == pytest.approx((-upper, upper))
    assert bounded_limits(np.full(24, 0.75), 0.95, 0.0) == pytest.approx(
        (stats.beta.ppf(0.025, 18, 7), stats.beta.ppf(0.975, 19, 6))
    )
    # 3 gains and 1 loss of 40: distances of each share to its limits, squared and added
    gain, loss = clopper_pearson(3, 40, 0.95), clopper_pearson(1, 40, 0.95)
    low = 0.05 - math.hypot(0.075 - gain[0], loss[1] - 0.025)
    assert bounded_limits(np.array([1.0] * 3 + [-1.0] + [0.0] * 36), 0.95, -1.0)[0] == pytest.approx(low)


@pytest.mark.parametrize("least", [-math.inf, 0.0, -1.0])
def test_values_that_differ_enough_keep_their_interval(least: float) -> None:
    values = np.array([0.5] * FEW + [1.0] * 30)
    assert limits(values, 0.8, 0.9, 0.95, least) == (0.8, 0.9, None)
    assert limits(values[1:], 0.8, 0.9, 0.95, least)[2] == (None if least == -math.inf else NEARLY_EQUAL)


@pytest.mark.parametrize(
    "found",
    [
        mean_interval(EQUAL, DRAWS),
        bootstrap(EQUAL, DRAWS),
        crossed_mean(np.repeat(EQUAL, 3, axis=1)),
        paired(EQUAL, EQUAL - 1, DRAWS).difference,
        crossed_difference(np.repeat(EQUAL, 2, axis=1), EQUAL),
        crossed_contrast([EQUAL, EQUAL, EQUAL], [1.0, -0.5, -0.5]),
        crossed_mean(EQUAL, groups=GROUPS),
    ],
)  # fmt: skip
def test_a_graded_reward_that_is_equal_for_all_prompts_has_no_interval(found: Any) -> None:
    units = 6 if getattr(found, "groups", None) else 24
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.method == f"no interval from {units} equal values"


def test_equal_shares_and_equal_answers_have_limits_that_are_no_point() -> None:
    shares = np.full((24, 1), 0.75)
    grouped = crossed_mean(shares, groups=GROUPS, least=0.0)
    assert (grouped.low, grouped.high) == pytest.approx(clopper_pearson(4.5, 6, 0.95))
    assert grouped.method == "t over 6 groups of prompts, this run only, and Clopper-Pearson"
    answers = (np.arange(24) < 20).astype(float)
    upper = 1 - 0.025 ** (1 / 24)
    for other in (paired(answers, answers, DRAWS), paired(shares, shares, DRAWS, shares=True)):
        assert (other.difference.low, other.difference.high, other.p) == (
            pytest.approx(-upper),
            pytest.approx(upper),
            1.0,
        )
    runs = crossed_difference(np.repeat(shares, 3, axis=1), shares, least=-1.0)
    assert (runs.low, runs.high, runs.p) == (pytest.approx(-upper), pytest.approx(upper), 1.0)


def test_four_prompts_of_400_are_not_significant_if_all_seeds_agree() -> None:
    # t = (4 / 400) / (sqrt(4 / 400 x 396 / 400 x 400 / 399) / 20) = 2.0, p = .046; 2 of 16 sign patterns are as extreme
    a = np.repeat((np.arange(400) < 4).astype(float)[:, None], 3, axis=1)
    assert crossed_difference(a, np.zeros((400, 1))).p == pytest.approx(0.046, abs=0.001)
    found = crossed_difference(a, np.zeros((400, 1)), least=-1.0)
    assert (found.p, found.low < 0 < found.high) == (2 / 16, True)


def test_several_seeds_over_one_prompt_have_an_interval_over_seeds() -> None:
    # 3 runs of a graded reward: mean 2, variance 1, t of 2 degrees of freedom at .975 is 4.302653
    found = crossed_mean([[1.0, 2.0, 3.0]])
    assert (found.value, found.df, found.from_prompts) == (2.0, 2.0, 0.0)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert found.method == "t over seeds, this prompt only, 2.0 degrees of freedom"
    welch = crossed_difference([[1.0, 2.0, 3.0]], [[0.0, 1.0]])
    assert welch.p == pytest.approx(stats.ttest_ind([1.0, 2.0, 3.0], [0.0, 1.0], equal_var=False).pvalue)
    assert crossed_mean([[1.0, 0.0, 1.0]], least=0.0).p == 1.0
    assert crossed_mean([[2.0, 2.0]]).method == "no interval from 1 value"
    with pytest.raises(DataError, match="only 1 of 1 prompts have a score from every run; an interval needs 2 prompts"):
        crossed_mean([[2.0]])


@pytest.mark.parametrize(("prompts", "rare", "share"), [(24, 0.06, 0.2), (120, 0.003, 0.9)])
def test_intervals_cover_the_mean_of_shares_near_the_edge(prompts: int, rare: float, share: float) -> None:
    """300 experiments of 8 answers to each prompt: a `rare` prompt is solved with chance 1 - `share`, all others always."""
    generator = np.random.Generator(np.random.PCG64(prompts))
    hard = generator.random((300, prompts)) < rare
    solved = 1 - generator.binomial(8, share * hard) / 8
    truth = 1 - rare * share
    found = [mean_interval(row, Resampling(100, 0.95, i), shares=True) for i, row in enumerate(solved)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.93
    # against a model that solves the rare prompts as rarely, the true difference is 0
    again = 1 - generator.binomial(8, share * hard) / 8
    pairs = [
        paired(a, b, Resampling(100, 0.95, i), shares=True) for i, (a, b) in enumerate(zip(solved, again, strict=True))
    ]
    assert np.mean([one.difference.low <= 0 <= one.difference.high for one in pairs]) >= 0.93
