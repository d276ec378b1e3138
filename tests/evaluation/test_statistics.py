"""Statistics against numbers written out by hand, textbook values, simulation, and properties."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.evaluation.nearly_equal import clopper_pearson
from posttrain.evaluation.statistics import (
    Resampling,
    bootstrap,
    bootstrap_means,
    floats,
    for_family,
    holm,
    mcnemar,
    mean_interval,
    paired,
    pass_at_k,
    pass_at_k_by_prompt,
    per_prompt,
    share_interval,
    sign_flip,
    wilson,
)

DRAWS = Resampling(resamples=2000, confidence=0.95, seed=7)


def test_wilson_agrees_with_the_formula_by_hand() -> None:
    # 8 of 10, z = 1.959964: centre (0.8 + 0.192073) / 1.384146, half 1.959964 * sqrt(0.016 + 0.0096036) / 1.384146.
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)


def test_wilson_does_not_collapse_where_nothing_is_right() -> None:
    low, high = wilson(0, 400)
    square = 1.959964**2
    assert (low, high) == (0.0, pytest.approx(square / (400 + square), abs=1e-6))
    assert wilson(400, 400) == (pytest.approx(1 - high), 1.0)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(DataError, match="0 <= successes <= n"):
        wilson(successes, n)


@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
def test_wilson_covers_the_truth_about_as_often_as_promised(p: float) -> None:
    counts = np.random.Generator(np.random.PCG64(1)).binomial(100, p, 4000)
    limits = {int(c): wilson(int(c), 100) for c in set(counts)}
    covered = np.mean([limits[int(c)][0] <= p <= limits[int(c)][1] for c in counts])
    assert covered == pytest.approx(0.95, abs=0.025)


def test_the_bootstrap_covers_the_mean_of_a_skewed_quantity() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    hits = 0
    for trial in range(1000):
        values = generator.exponential(1.0, 120)
        interval = bootstrap(values, Resampling(400, 0.95, trial))
        hits += interval.low <= 1.0 <= interval.high
    assert hits / 1000 == pytest.approx(0.94, abs=0.02)  # a little under 0.95: percentiles do not correct the skew


def test_clusters_widen_the_interval_that_treats_copies_as_data() -> None:
    prompts = (np.arange(60) % 3 == 0).astype(float)
    copied = np.repeat(prompts[:, None], 5, axis=1)
    clustered, naive = bootstrap(copied, DRAWS), bootstrap(copied.ravel(), DRAWS)
    single = bootstrap(prompts, DRAWS)
    assert (clustered.low, clustered.high, clustered.n) == (single.low, single.high, 60)
    assert clustered.high - clustered.low == pytest.approx((naive.high - naive.low) * math.sqrt(5), rel=0.15)


def test_the_bootstrap_repeats_itself_and_its_spread_is_the_standard_error() -> None:
    values = np.arange(50.0)
    means = bootstrap_means(values, DRAWS)
    assert np.array_equal(means, bootstrap_means(values, DRAWS))
    assert not np.array_equal(means, bootstrap_means(values, Resampling(2000, 0.95, 8)))
    assert means.std() == pytest.approx(values.std() / math.sqrt(50), rel=0.05)


def test_resampling_in_pieces_draws_the_same_number_of_means() -> None:
    assert bootstrap_means(np.ones(3_000_000), Resampling(3, 0.95, 0)).tolist() == [1.0, 1.0, 1.0]


def test_missing_values_are_left_out_and_counted() -> None:
    assert per_prompt([[1.0, None], [None, None], [0.0, 1.0]]).tolist() == pytest.approx(
        [1, math.nan, 0.5], nan_ok=True
    )
    interval = mean_interval([1.0, None, 0.0, math.nan, 1.0], DRAWS)
    assert (interval.value, interval.n, interval.missing, interval.method) == (pytest.approx(2 / 3), 3, 2, "Wilson")
    with pytest.raises(DataError, match="every reward is missing"):
        mean_interval([None, None], DRAWS)
    with pytest.raises(DataError, match="infinite"):
        floats([1.0, math.inf])


def test_the_interval_of_a_mean_says_how_it_was_made() -> None:
    assert mean_interval([0, 1, 1], DRAWS).method == "Wilson"
    assert mean_interval([[0], [1]], DRAWS).method == "Wilson"
    assert mean_interval([0.2, 1, 1], DRAWS).method == "bootstrap over prompts"
    assert mean_interval([[0, 1], [1, 1]] * 10, DRAWS).method == "bootstrap over prompts"
    nothing = mean_interval(np.zeros((40, 3)), DRAWS)
    assert (nothing.method, nothing.low, nothing.high) == ("Clopper-Pearson", 0.0, pytest.approx(1 - 0.025 ** (1 / 40)))


@pytest.mark.parametrize(("prompts", "share"), [(1, 0.75), (24, 0.75), (24, 0.5), (400, 0.25)])
def test_equal_shares_leave_no_interval_of_a_point(prompts: int, share: float) -> None:
    found = share_interval(np.full(prompts, share), DRAWS)
    assert (found.method, found.low, found.high) == (
        "Clopper-Pearson",
        *clopper_pearson(prompts * share, prompts, 0.95),
    )
    if (prompts, share) == (24, 0.75):  # the table of Clopper and Pearson for 18 of 24
        assert (found.low, found.high) == (pytest.approx(0.5329, abs=1e-4), pytest.approx(0.9023, abs=1e-4))
    # a graded reward has no bounds, so that nothing is known beyond the one value
    assert mean_interval(np.full(prompts, share), DRAWS).method.startswith(f"no interval from {prompts} ")


def test_mcnemar_against_binomials_written_out() -> None:
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(0, 3) == pytest.approx(2 / 8)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(3, 4) == 1.0


def test_mcnemar_is_exact_where_floating_binomials_overflow() -> None:
    a, b = 2400, 2600
    exact = 2 * sum(math.comb(a + b, i) for i in range(a + 1)) / 2 ** (a + b)
    assert mcnemar(a, b) == exact
    assert 0.0 < mcnemar(0, 1000) < 1e-300


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_symmetric_probability(a: int, b: int) -> None:
    assert mcnemar(a, b) == mcnemar(b, a)
    assert 0 < mcnemar(a, b) <= 1


def test_sign_flip_over_all_patterns_by_hand() -> None:
    # |sum| over the 8 patterns of (1, 2, 3): 6, 4, 2, 0, 0, 2, 4, 6; the observed 1 + 3 - 2 = 2 is reached by six.
    assert sign_flip([1, -2, 3], DRAWS) == 6 / 8
    assert sign_flip([0.1, 0.2, 0.3, 0.0, None], DRAWS) == 2 / 8
    assert sign_flip([0.0, 0.0], DRAWS) == 1.0


@given(st.integers(0, 8), st.integers(0, 8))
def test_sign_flip_of_unit_differences_is_mcnemar(a: int, b: int) -> None:
    assert sign_flip([1.0] * a + [-1.0] * b + [0.0] * 3, DRAWS) == pytest.approx(mcnemar(a, b))


def test_random_sign_patterns_agree_with_mcnemar_and_are_never_zero() -> None:
    assert sign_flip([1.0] * 40 + [-1.0] * 22, Resampling(20_000, 0.95, 0)) == pytest.approx(mcnemar(40, 22), abs=0.004)
    assert sign_flip(np.ones(100), DRAWS) == 1 / 2001


def test_a_clear_difference_stays_significant_in_any_family() -> None:
    """91 tests with 2,000 draws each: the least p would be .0455 after the correction, whatever the difference."""
    assert for_family(DRAWS, 1).resamples == 2000
    assert for_family(DRAWS, 91).resamples == 36_400
    left, right = np.full((60, 3), 0.8), np.zeros((60, 3))
    alone, among = paired(left, right, DRAWS), paired(left, right, DRAWS, tests=91)
    assert (alone.p, among.p) == (1 / 2001, 1 / 36_401)
    assert 91 * among.p < 0.0026 < 0.045 < 91 * alone.p
    assert alone.difference == among.difference


@pytest.mark.parametrize("prompts", [12, 40])
def test_permutation_p_values_keep_their_promise_when_nothing_differs(prompts: int) -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    p = np.array([sign_flip(generator.normal(size=prompts), Resampling(199, 0.95, i)) for i in range(1000)])
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.045)


def test_paired_counts_the_prompts_that_only_one_side_solved() -> None:
    a, b = [1, 1, 1, 1, 0, 0, None, 1], [0, 0, 0, 1, 1, 0, 1, None]
    test = paired(a, b, DRAWS)
    assert (test.only_a, test.only_b, test.method) == (3, 1, "exact McNemar")
    assert test.p == pytest.approx(2 * (1 + 4) / 16)
    assert (test.difference.value, test.difference.n, test.difference.missing) == (pytest.approx(2 / 6), 6, 2)
    assert test.difference.low <= 2 / 6 <= test.difference.high


def test_paired_treats_the_seeds_of_one_prompt_as_one_cluster() -> None:
    a = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]])
    b = np.array([0, 0, 0, 1])
    test = paired(a, b, DRAWS)
    assert test.difference.value == pytest.approx((1 + 2 / 3 + 0 - 1 / 3) / 4)
    # Patterns of (1, 2/3, -1/3) whose |sum| is at least 4/3: both of ±(1, 2/3, -1/3) and of ±(1, 2/3, 1/3).
    assert (test.p, test.method, test.only_a) == (4 / 8, "sign-flip permutation over prompts", None)


def test_paired_is_stricter_with_copied_seeds_than_with_independent_ones() -> None:
    generator = np.random.Generator(np.random.PCG64(4))
    base = generator.binomial(1, 0.5, 30).astype(float)
    single = np.where(np.arange(30) < 6, 1.0, base)
    copies = np.repeat(single[:, None], 4, axis=1)
    assert paired(copies, base, DRAWS).p == pytest.approx(paired(single, base, DRAWS).p)


def test_paired_refuses_different_prompts() -> None:
    with pytest.raises(DataError, match="got 2 and 3"):
        paired([1, 0], [1, 0, 1], DRAWS)


def test_holm_by_hand() -> None:
    # Sorted: .005 * 4 = .02, .01 * 3 = .03, .03 * 2 = .06, .04 * 1 = .04 raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(raw <= new <= min(1, raw * len(p)) for raw, new in zip(p, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    right = [True, True, False, False, False, False]
    for k in range(1, 7):
        subsets = list(combinations(right, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_finite_where_binomials_do_not_fit_a_float() -> None:
    expected = 1 - math.comb(9_990, 500) / math.comb(10_000, 500)
    assert pass_at_k(10_000, 10, 500) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=200)
@given(st.data())
def test_pass_at_k_rises_with_k_and_with_right_answers(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 40))
    correct, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n - 1))
    value = pass_at_k(n, correct, k)
    assert 0 <= value <= 1
    assert pass_at_k(n, correct, k + 1) >= value
    assert pass_at_k(n, correct + 1, k) >= value
    assert pass_at_k(n, correct, 1) == pytest.approx(correct / n)


def test_pass_at_k_is_unbiased() -> None:
    draws = np.random.Generator(np.random.PCG64(5)).binomial(8, 0.3, 20_000)
    values = {int(c): pass_at_k(8, int(c), 4) for c in set(draws)}
    assert np.mean([values[int(c)] for c in draws]) == pytest.approx(1 - 0.7**4, abs=0.005)


def test_pass_at_k_by_prompt_leaves_out_prompts_with_too_few_known_samples() -> None:
    values = pass_at_k_by_prompt([[1, 0, 0, None], [1, None, None, None], [0, 0, 0, 0]], 2)
    assert values.tolist() == pytest.approx([2 / 3, math.nan, 0.0], nan_ok=True)
    with pytest.raises(DataError, match="0 or 1"):
        pass_at_k_by_prompt([[0.5, 1.0]], 1)
    with pytest.raises(DataError, match="k <= n"):
        pass_at_k(3, 1, 4)
