"""How often the gate promotes a model that is no better (level), and one that is (power), by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.promotion.decision import paired_differences
from pipelines.promotion.gain import POWER, detectable, gain, shown, units
from posttrain.evaluation.statistics import Floats, Resampling

NOMINAL = 0.025
TRIALS = 1500


def upper(nominal: float, trials: int) -> float:
    """Largest share that a test of this level shows in so many trials, but for one chance in 3,000."""
    return nominal + 3.4 * math.sqrt(nominal * (1 - nominal) / trials)


def answered(rng: np.random.Generator, chance: Floats, samples: int) -> Floats:
    return (rng.random((*chance.shape, samples)) < chance[..., None]).astype(float)


def promoted(n: int, *, gain: float = 0.0, ease: tuple[float, float] = (2, 1), samples: int = 4, candidates: int = 1,
             tolerated: float = 0.0, trials: int = TRIALS) -> float:  # fmt: skip
    """Share of trials in which one candidate is promoted; prompts have their own chance of being answered right."""
    rng = np.random.default_rng(n)
    chance = rng.beta(*ease, (trials, n))
    mine = answered(rng, np.clip(chance + gain, 0, 1), samples).mean(-1)
    theirs = answered(rng, chance, samples).mean(-1)
    resampling = Resampling(1000, 1 - 2 * NOMINAL / candidates, 7)
    return float(shown(mine - theirs, tolerated, 1.0, resampling).mean())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 20, 50, 100, 200, 400])
def test_equal_models_are_promoted_no_more_often_than_the_level_allows(n: int) -> None:
    assert promoted(n) <= upper(NOMINAL, TRIALS)


@pytest.mark.parametrize("ease", [(0.05, 0.05), (30, 0.3), (50, 50)], ids=["ties", "nearly all right", "even"])
@pytest.mark.parametrize("n", [8, 50, 200])
def test_the_level_holds_with_ties_and_extreme_prompts(n: int, ease: tuple[float, float]) -> None:
    assert promoted(n, ease=ease, samples=1 if ease == (50, 50) else 4) <= upper(NOMINAL, TRIALS)


@pytest.mark.parametrize("n", [3, 20, 100])
def test_the_level_holds_for_the_best_of_eight_candidates_and_several_seeds(n: int) -> None:
    """Two algorithms with four seeds each: runs of one algorithm share the prompts that they find easy, all share the reference."""
    rng, trials, candidates = np.random.default_rng(n), 600, 8
    chance = rng.beta(2, 1, (trials, n))
    theirs = answered(rng, chance, 4).mean(-1)
    resampling = Resampling(1000, 1 - 2 * NOMINAL / candidates, 7)
    any_promoted = np.zeros(trials, bool)
    for _ in range(candidates):
        mine = answered(rng, chance, 4).mean(-1)
        any_promoted |= shown(mine - theirs, 0.0, 1.0, resampling)
    assert any_promoted.mean() <= upper(NOMINAL, trials)


def test_all_equal_prompts_promote_nobody() -> None:
    for n in (1, 2, 50, 400):
        assert not shown(np.zeros((1, n)), 0.0, 1.0, Resampling(1000, 0.95, 0)).any()


def test_the_level_holds_if_rewards_are_missing_or_the_set_is_cut_short() -> None:
    rng, resampling, trials, hits = np.random.default_rng(5), Resampling(1000, 0.95, 0), 400, 0
    rows = []
    for _ in range(trials):
        chance = rng.beta(2, 1, 60)
        tables = [answered(rng, chance, 4) for _ in range(2)]
        for table in tables:
            table[rng.random(table.shape) < 0.05] = np.nan
        rows.append(paired_differences(*tables)[:40])
    hits = int(shown(np.array(rows), 0.0, 1.0, resampling).sum())
    assert hits / trials <= upper(NOMINAL, trials)


@pytest.mark.parametrize("n", [30, 100, 400])
def test_a_rare_heavy_loss_passes_a_tolerated_loss_no_more_often_than_the_level_allows(n: int) -> None:
    """A mean loss equal to the tolerated one lies on few prompts, of which a small set may show none."""
    tolerated, trials = 0.02, TRIALS
    d = -(np.random.default_rng(n).random((trials, n)) < tolerated).astype(float)
    assert shown(d, tolerated, 1.0, Resampling(1000, 0.95, 0)).mean() <= upper(NOMINAL, trials)


def test_skewed_differences_with_an_equal_mean_stay_near_the_level_from_a_hundred_prompts() -> None:
    """A sign-flip test is exact for equal models only: +1/4 on four of five prompts against -1 on the fifth has the same mean."""
    d = np.where(np.random.default_rng(0).random((TRIALS, 100)) < 0.8, 0.25, -1.0)
    assert shown(d, 0.0, 1.0, Resampling(1000, 0.95, 0)).mean() <= 0.06


def test_power_is_what_the_page_says() -> None:
    """At the gain that the page names for the observed spread, about 80 of 100 better models are promoted."""
    n, rng = 200, np.random.default_rng(3)
    chance = np.full((TRIALS, n), 0.5)
    theirs = answered(rng, chance, 4).mean(-1)
    named = detectable(answered(rng, chance[0], 4).mean(-1) - theirs[0], NOMINAL)
    mine = answered(rng, chance + named, 4).mean(-1)
    share = float(shown(mine - theirs, 0.0, 1.0, Resampling(1000, 0.95, 0)).mean())
    # the spread of one draw of 200 prompts is off by 5 %, which moves the power by about 4 points
    assert abs(share - POWER) < 0.1


def test_power_rises_with_the_prompts() -> None:
    shares = [promoted(n, gain=0.1, trials=500) for n in (8, 50, 200)]
    assert shares[0] < 0.1 < shares[1] < 0.9 < shares[2]


def test_the_level_holds_over_groups_of_prompts_and_not_over_the_prompts_in_them() -> None:
    # 40 groups of 5 prompts; the two models differ by group and not on average
    rng, trials, groups = np.random.default_rng(3), 600, [str(i // 5) for i in range(200)]
    d = np.repeat(rng.normal(0, 0.3, (trials, 40)), 5, axis=1) + rng.normal(0, 0.3, (trials, 200))
    resampling = Resampling(1000, 0.95, 7)
    grouped = np.array([units(row, groups)[0] for row in d])
    assert shown(grouped, 0.0, 1.0, resampling).mean() <= upper(NOMINAL, trials)
    assert shown(d, 0.0, 1.0, resampling).mean() > 0.1


def test_groups_of_one_prompt_each_change_nothing() -> None:
    d = np.array([0.5, 0.0, 0.25, 0.75, -0.25, 0.5, 0.5, 0.25])
    resampling = Resampling(2000, 0.95, 0)
    ungrouped, each = gain(d, 0.0, 1.0, resampling), gain(d, 0.0, 1.0, resampling, [f"g{i}" for i in range(8)])
    assert (each.interval.low, each.interval.high) == pytest.approx((ungrouped.interval.low, ungrouped.interval.high))
    assert each.p == pytest.approx(ungrouped.p, abs=0.02)
    assert each.interval.method == "t over 8 groups of prompts"


def test_the_interval_over_groups_of_different_sizes_by_hand() -> None:
    # the mean is .5; the groups' sums of deviations are 1.5, -.5 and -1, so the squared error is 3.5 / 36 x 3 / 2
    d, groups = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), list("aaabcc")
    found = gain(d, 0.0, 1.0, Resampling(2000, 0.95, 0), groups)
    error = math.sqrt((1.5**2 + 0.5**2 + 1.0**2) / 36 * 3 / 2)
    assert found.interval.value == pytest.approx(0.5)
    assert found.interval.high - 0.5 == pytest.approx(4.302652729911275 * error)
    assert units(d, groups)[0].tolist() == pytest.approx([1.5, 0.0, 0.0])
