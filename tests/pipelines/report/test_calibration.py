"""Copies of one algorithm compared with themselves."""

from __future__ import annotations

import math

import numpy as np

from pipelines.report.calibration import SPLITS, Rate, power_lines, rates, simulated, splits
from posttrain.evaluation.crossed import Spread
from posttrain.evaluation.statistics import Resampling, wilson


def copies(runs: int, prompts: int, between: float, seed: int) -> np.ndarray:
    """One algorithm's right and wrong answers; its runs' accuracies differ by the standard deviation `between`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    accuracy = np.clip(0.7 + generator.normal(0, between, runs), 0, 1)
    return (generator.random((prompts, runs)) < accuracy).astype(float)


def test_splits_are_disjoint_distinct_and_all_of_them_where_few() -> None:
    assert splits(4, 1, 0) == [([0], [1]), ([0], [2]), ([0], [3]), ([1], [2]), ([1], [3]), ([2], [3])]
    assert sorted(splits(4, 2, 0)) == [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
    assert splits(5, 3, 0) == []
    many = splits(20, 5, 1)
    assert len(many) == len({str(pair) for pair in many}) == SPLITS
    assert all(not set(a) & set(b) for a, b in many)


def test_runs_that_differ_fool_the_test_over_prompts_and_not_the_crossed_one() -> None:
    found = {
        (rate.method, rate.seeds): rate
        for rate in rates([copies(20, 400, 0.08, s) for s in range(3)], [1, 3, 5, 11], Resampling(500))
    }
    assert set(found) == {("prompts only", k) for k in (1, 3, 5)} | {("seeds and prompts", k) for k in (3, 5)}
    assert found["prompts only", 3].share > 0.3
    assert found["seeds and prompts", 3].share <= 0.07
    assert found["seeds and prompts", 5].share <= 0.07
    assert found["seeds and prompts", 5].independent == 6
    assert found["prompts only", 1].pairs == 3 * 190


def test_a_rates_interval_counts_only_pairs_that_share_no_run() -> None:
    assert Rate("", 3, 10, 200, 9).interval == wilson(0.05 * 9, 9)


def test_the_simulated_level_is_the_nominal_one() -> None:
    spread = Spread(0.004, 0.1, 0.15)
    for seeds in (3, 5, 10):
        assert 0.035 < simulated(spread, seeds, 100, 0.95) < 0.065


def test_power_is_said_in_points_and_seeds() -> None:
    spread = Spread(0.0025, 0.1, 0.1)
    lines = list(power_lines(spread, 5, 400))
    assert lines[0] == (
        f"5 seeds an algorithm and 400 prompts show a difference of {100 * spread.smallest_difference(5, 400):.1f} points"
        " with 80 % power"
    )
    assert lines[2] == f"5 points: {spread.seeds_for(0.05, 400)} seeds"
    assert spread.smallest_difference(spread.seeds_for(0.05, 400) - 1, 400) > 0.05
    for silent in (Spread(0.0, 0.0, 0.0), Spread(math.nan, math.nan, math.nan)):
        assert ["do not differ" in line for line in power_lines(silent, 5, 400)] == [True]
    assert next(iter(power_lines(spread, 1, 400))) == "1 seed an algorithm: no statement about training is possible"
