"""Comparisons over seeds and prompts: by hand, against a mixed model's closed form, and by simulation of their level."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from posttrain.errors import DataError
from posttrain.evaluation.crossed import (
    CAUTION,
    Spread,
    clustered_standard_error,
    crossed_contrast,
    crossed_difference,
    crossed_mean,
    moments,
    two_way_bootstrap,
)
from posttrain.evaluation.runs import (
    effect_size,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)

A = np.array([[0.9, 0.7], [0.5, 0.7], [0.4, 0.2]])
B = np.array([[0.6, 0.2], [0.5, 0.1], [0.3, 0.1]])


def test_a_difference_by_hand() -> None:
    # prompts: a .8 .6 .3, b .4 .3 .2; differences .4 .3 .1, mean 4/15, variance (.0178 + .0011 + .0278) / 2 = .0233
    value, from_prompts = 0.8 / 3, 0.07 / 3 / 3
    # runs of a: .6 and .5333; half differences .1 -.1 .1 around 1/30 leave .0667 -.1333 .0667 in either column, 2 degrees of freedom
    runs_a, rest_a = (0.2 / 3) ** 2 / 2, 2 * ((0.2 / 3) ** 2 + (0.4 / 3) ** 2 + (0.2 / 3) ** 2) / 2
    # runs of b: .4667 and .1333; half differences .2 .2 .1 around 1/6
    runs_b, rest_b = (1.0 / 3) ** 2 / 2, 2 * ((0.1 / 3) ** 2 + (0.1 / 3) ** 2 + (0.2 / 3) ** 2) / 2
    excess_a, excess_b = (runs_a - rest_a / 3) / 2, (runs_b - rest_b / 3) / 2
    from_runs = excess_a + excess_b
    freedom = (from_prompts + from_runs) ** 2 / (
        from_prompts**2 / 2 + CAUTION * (max(excess_a, 0) ** 2 + excess_b**2) / 1
    )
    found = crossed_difference(A, B)
    assert found.value == pytest.approx(value)
    assert (found.from_prompts, found.from_runs) == pytest.approx((from_prompts, from_runs))
    assert found.df == pytest.approx(max(1.0, freedom))
    reach = stats.t.ppf(0.975, found.df) * math.sqrt(from_prompts + from_runs)
    assert (found.low, found.high) == pytest.approx((value - reach, value + reach))
    assert found.p == pytest.approx(2 * stats.t.sf(value / math.sqrt(from_prompts + from_runs), found.df))
    assert (found.seeds, found.prompts, found.missing, found.about_training) == ((2, 2), 3, 0, True)


def test_a_contrast_of_two_is_the_difference_and_weights_scale_it() -> None:
    one, two = crossed_difference(A, B), crossed_contrast([A, B], [1, -1])
    assert (two.value, two.low, two.high, two.df) == pytest.approx((one.value, one.low, one.high, one.df))
    half = crossed_contrast([A, B], [0.5, -0.5])
    assert (half.value, half.low, half.high) == pytest.approx((one.value / 2, one.low / 2, one.high / 2))
    # twice the same difference: A and B each enter twice, so that the variances are twice those of one difference from runs
    twice = crossed_contrast([A, B, B, A], [1, -1, -1, 1])
    assert twice.value == pytest.approx(2 * one.value)
    assert twice.from_runs == pytest.approx(2 * one.from_runs)
    assert twice.from_prompts == pytest.approx(4 * one.from_prompts)
    with pytest.raises(DataError, match="got 3 and 2 and 3"):
        crossed_contrast([A, B[:2], A], [1, -1, 0])


def test_one_seed_says_nothing_about_training() -> None:
    found = crossed_difference(A[:, :1], B[:, :1], fixed_b=False)
    assert not found.about_training
    assert found.method == "t over prompts, this run only"
    paired = stats.ttest_rel(A[:, 0], B[:, 0])
    assert found.p == pytest.approx(paired.pvalue)
    assert not crossed_mean(A[:, 0]).about_training


def test_prompts_without_a_score_of_every_run_are_left_out_and_counted() -> None:
    holed = np.vstack([A, [[np.nan, 1.0]]])
    found = crossed_difference(holed, np.vstack([B, [[0.0, 0.0]]]))
    assert (found.missing, found.prompts) == (1, 3)
    assert found.value == pytest.approx(crossed_difference(A, B).value)
    with pytest.raises(DataError, match="only 0 of 5 prompts have a score from every run"):
        crossed_mean(np.full((5, 2), np.nan))
    with pytest.raises(DataError, match="same prompts"):
        crossed_difference(A, B[:2])


def test_equal_answers_of_right_or_wrong_leave_room_for_one_more_prompt() -> None:
    found = crossed_difference(np.ones((100, 3)), np.ones((100, 3)))
    assert found.value == 0
    assert found.p == 1.0
    assert found.from_prompts == pytest.approx(1 / 100 / 9 / 100)


def simulated(
    generator: np.random.Generator, n: int, prompts: int, seeds: int, run: float, crossed: float, rest: float
) -> list[np.ndarray]:
    """Two algorithms of equal mean in `n` experiments: [n, prompts, seeds] each."""
    shared = generator.normal(0, 0.7, (n, prompts, 1))
    return [
        shared
        + generator.normal(0, math.sqrt(crossed), (n, prompts, 1))
        + generator.normal(0, math.sqrt(run), (n, 1, seeds))
        + generator.normal(0, math.sqrt(rest), (n, prompts, seeds))
        for _ in range(2)
    ]


GRID = list(itertools.product((3, 5, 10), (0.0, 0.003, 0.03), ((0.1, 1.0), (1.0, 0.1)), (False, True)))


def test_intervals_cover_the_true_difference_in_93_to_97_percent() -> None:
    """4,000 experiments in each cell of a grid; scores are real numbers or, thresholded, right or wrong."""
    generator = np.random.Generator(np.random.PCG64(13))
    covered = {}
    for seeds, run, (crossed, rest), binary in GRID:
        a, b = simulated(generator, 4000, 60, seeds, run, crossed, rest)
        if binary:
            a, b = (a > 0).astype(float), (b > 0).astype(float)
        found = moments(a, b)
        reach = stats.t.ppf(0.975, found.df) * np.sqrt(found.from_prompts + found.from_runs)
        covered[seeds, run, crossed, binary] = float((np.abs(found.value) <= reach).mean())
    # a cell's share of 4,000 has a standard error of .0035; with 10,000 the cells lie between .938 and .965
    assert 0.945 <= np.mean(list(covered.values())) <= 0.96
    assert {cell: share for cell, share in covered.items() if not 0.93 <= share <= 0.97} == {}


def test_prompts_alone_would_call_equal_algorithms_different() -> None:
    """An interval over prompts only finds differences that do not exist, here in the cell of this project's own history."""
    generator = np.random.Generator(np.random.PCG64(7))
    a, b = simulated(generator, 2000, 400, 3, 0.01, 0.1, 1.0)
    gaps = a.mean(-1) - b.mean(-1)
    over_prompts = np.abs(gaps.mean(-1)) > 1.96 * gaps.std(-1, ddof=1) / math.sqrt(400)
    found = moments(a, b)
    crossed = np.abs(found.value) > stats.t.ppf(0.975, found.df) * np.sqrt(found.from_prompts + found.from_runs)
    assert over_prompts.mean() > 0.25
    assert crossed.mean() < 0.07


def test_the_bootstrap_and_the_closed_form_agree() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    (a,), (b,) = simulated(generator, 1, 300, 6, 0.02, 0.3, 0.3)
    found = crossed_difference(a, b)
    drawn = two_way_bootstrap(a, b, 1000)
    assert drawn.mean() == pytest.approx(found.value, abs=0.2 * found.standard_error)
    assert drawn.std() == pytest.approx(found.standard_error, rel=0.15)


def test_small_statistics_by_hand() -> None:
    assert interquartile_mean([0.0, 0.2, 0.4, 1.0]) == pytest.approx(0.3)
    assert performance_profile([0.2, 0.4, 0.9], [0.1, 0.4, 0.9]).tolist() == pytest.approx([1, 1 / 3, 0])
    assert probability_of_improvement([1, 2], [1, 0]) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    # means 3 and 1, each side's variance 2: pooled standard deviation sqrt 2; correction 1 - 3 / 7
    assert effect_size([2, 4], [0, 2]) == pytest.approx(2 / math.sqrt(2) * (1 - 3 / 7))
    assert math.isnan(effect_size([1], [0, 2]))


def test_prompts_in_groups_have_the_standard_error_of_their_groups() -> None:
    # deviations ±.5: groups of two equal ones sum to ±1: sqrt(1 + 1) / 4; every prompt its own group: sqrt(4 x .25) / 4
    assert clustered_standard_error([1, 1, 0, 0], [7, 7, 9, 9]) == pytest.approx(math.sqrt(2) / 4)
    assert clustered_standard_error([1, 1, 0, 0], [1, 2, 3, 4]) == pytest.approx(0.25)


def test_a_planned_experiment_has_the_power_that_was_promised() -> None:
    spread = Spread(run=0.01, prompt=0.2, rest=0.5)
    smallest = spread.smallest_difference(5, 200)
    generator = np.random.Generator(np.random.PCG64(5))
    a, b = simulated(generator, 4000, 200, 5, 0.01, 0.1, 0.5)
    found = moments(a + smallest, b)
    shown = np.abs(found.value) > stats.t.ppf(0.975, found.df) * np.sqrt(found.from_prompts + found.from_runs)
    assert 0.75 < shown.mean() < 0.85
    assert spread.seeds_for(smallest, 200) == 5
    assert spread.seeds_for(0.0001, 200) is None


def test_a_pilot_finds_the_variances_it_was_drawn_from() -> None:
    generator = np.random.Generator(np.random.PCG64(11))
    (a,), (b,) = simulated(generator, 1, 2000, 200, 0.04, 0.3, 0.6)
    spread = Spread.of(a, b)
    assert (spread.run, spread.prompt, spread.rest) == pytest.approx((0.04, 0.6, 0.6), rel=0.15)
    with pytest.raises(DataError, match="at least 2 seeds"):
        Spread.of(a[:, :1], b)


def test_the_plan_for_prompts_in_groups_needs_the_clustered_error() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    # 60 groups of 4 prompts whose difference has variance .04 between groups and .01 within them
    shared = np.repeat(generator.normal(0, 0.2, 60), 4)
    a = (shared + generator.normal(0, 0.1, 240))[:, None] + generator.normal(0, 0.001, (240, 3))
    b, groups = generator.normal(0, 0.001, (240, 3)), [f"g{i // 4}" for i in range(240)]
    ungrouped, clustered = Spread.of(a, b), Spread.of(a, b, groups)
    # 240 / 60 x (.04 + .01 / 4) = .17 instead of .05
    assert ungrouped.prompt == pytest.approx(0.05, rel=0.25)
    assert clustered.prompt == pytest.approx(0.17, rel=0.25)
    assert (ungrouped.run, ungrouped.rest) == (clustered.run, clustered.rest)
    assert clustered.smallest_difference(5, 240) > 1.5 * ungrouped.smallest_difference(5, 240)
