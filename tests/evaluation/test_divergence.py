"""Find when a run began to optimise its reward model against the true reward."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.evaluation.divergence import divergence

STEPS = 40


def noise(seed: int, steps: int = STEPS) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(0, 0.06, steps)


def test_a_fall_under_a_rising_score_is_found_with_its_beginning() -> None:
    rising = np.linspace(0.0, 2.0, STEPS)
    truth = np.where(np.arange(STEPS) < 20, 0.5, 0.2)
    found = [divergence(truth + noise(seed), rising + noise(seed + 100)) for seed in range(50)]
    assert all(one is not None for one in found)
    known = [one for one in found if one is not None]
    # one run in fifty has an alarm by noise before
    assert sum(abs(one.began - 20) <= 1 and one.noticed <= 23 for one in known) >= 47
    assert all(one.noticed > one.began and one.score_gain > 0 for one in known)


def test_a_clean_fall_is_computed_by_hand() -> None:
    truth = [0.55, 0.5, 0.45, 0.5] * 3 + [0.1, 0.15, 0.05] * 4
    found = divergence(truth, range(24))
    assert found is not None
    # the highest mean of five steps is that of .55 .5 .45 .5 .55; the scores of those steps are 0 to 4, or 4 to 8
    assert (found.began, found.noticed, found.level) == (12, 13, pytest.approx(0.51))
    assert (found.truth, found.score_gain) == (pytest.approx(0.125), pytest.approx(12.5 - 6))
    # a monitor that sees only the first steps says the same, one step earlier nothing
    assert divergence(truth[:14], range(14)) == found
    assert divergence(truth[:13], range(13)) is None


def correlated(seed: int, steps: int, innovations: float = 0.04) -> np.ndarray:
    """Return noise whose drift has a correlation of .5 between neighbouring steps, on top of the independent noise."""
    drawn = np.random.Generator(np.random.PCG64([seed, 1])).normal(0, innovations, steps)
    drift = np.zeros(steps)
    for step in range(1, steps):
        drift[step] = 0.5 * drift[step - 1] + drawn[step]
    return drift + noise(seed, steps)


@pytest.mark.parametrize(("steps", "most"), [(20, 0.05), (40, 0.06), (100, 0.07)])
def test_correlated_steps_raise_few_alarms(steps: int, most: float) -> None:
    score = np.linspace(0.0, 2.0, steps)
    alarms = [divergence(0.4 + correlated(seed, steps), score) is not None for seed in range(300)]
    # with a variance from neighbouring steps only it was 4, 13 and 31 %
    assert np.mean(alarms) <= most


def test_a_fall_of_correlated_steps_is_found_also_after_a_rise() -> None:
    rise = np.concatenate([np.linspace(0.3, 0.6, 50), np.full(30, 0.3)])
    found = [divergence(rise + correlated(seed, 80), np.arange(80)) for seed in range(60)]
    seen = [one is not None and 50 <= one.noticed <= 60 for one in found]
    assert np.mean(seen) >= 0.85


@pytest.mark.parametrize("steps", [20, 40])
def test_runs_that_do_not_diverge_raise_few_alarms(steps: int) -> None:
    score = np.linspace(0.0, 2.0, steps)
    flat = [divergence(0.5 + noise(seed, steps), score) is not None for seed in range(150)]
    rising = [divergence(np.linspace(0.3, 0.8, steps) + noise(seed, steps), score) is not None for seed in range(150)]
    assert np.mean(flat) <= 0.03
    assert np.mean(rising) <= 0.02


def test_a_run_that_gets_worse_by_both_measures_hacks_nothing() -> None:
    truth = np.where(np.arange(STEPS) < 20, 0.5, 0.2) + noise(0)
    assert divergence(truth, truth) is None
    assert divergence(truth, np.linspace(0.0, 2.0, STEPS)) is not None


def test_steps_without_a_value_are_skipped_and_positions_stay() -> None:
    truth = np.where(np.arange(STEPS) < 20, 0.5, 0.1) + noise(3)
    truth[[2, 21]] = np.nan
    found = divergence(truth, np.arange(STEPS))
    assert found is not None
    assert found.began in (19, 20)
    assert divergence(truth[:8], np.arange(8)) is None
    assert divergence(np.full(STEPS, 0.3), np.arange(STEPS)) is None


def test_curves_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="got 3 and 2"):
        divergence([1.0, 2.0, 3.0], [1.0, 2.0])
