"""The gate's arithmetic, every number written out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.promotion.decision import (
    BenchmarkMargin,
    Check,
    Decision,
    GateLimits,
    SampledAnswers,
    cautious,
    decide,
    divergence,
    paired_differences,
    standardised_gain,
)
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Resampling

LIMITS = GateLimits(
    tolerated_loss=0.0,
    max_kl=5.0,
    max_length_ratio=1.5,
    max_truncated=0.25,
    max_divergence=0.5,
    min_prompts=8,
    max_missing=0.25,
)
RESAMPLING = Resampling(2000, 0.95, 0)


def answers(name: str, reward: list[list[float]], **fields: object) -> SampledAnswers:
    table = np.array(reward, float)
    given = {
        "prompts": tuple((i, f"{i}+1?", str(i + 1)) for i in range(len(reward))),
        "scores": {"rm": table.copy()},
        "kl": np.full(table.shape, 2.0),
        "tokens": np.full(table.shape, 10.0),
        "truncated": np.zeros(table.shape),
    } | fields
    return SampledAnswers(name, reward=table, **given)  # type: ignore[arg-type]


def check(decision: Decision, name: str) -> Check:
    return next(found for found in decision.checks if found.name == name)


SHAPE = (8, 2)
CHAMPION = answers("champion", [[0, 1], [0, 0], [1, 1], [0, 1]] * 2)
BETTER = answers("better", [[1, 1]] * 8)


def test_equal_differences_have_no_interval_in_words() -> None:
    loss = check(decide(CHAMPION, CHAMPION, LIMITS, RESAMPLING), "loss")
    assert not loss.passed
    assert loss.words.startswith("true reward against champion +0, no interval from 8 equal values over 8 prompts")


def test_a_model_that_is_better_on_enough_prompts_passes_all_checks() -> None:
    champion = answers("champion", [[0, 1], [0, 0], [0, 0], [0, 1]] * 2)
    decision = decide(BETTER, champion, LIMITS, RESAMPLING)
    assert decision.promote
    assert decision.refusals == []
    # per prompt .5, 1, 1, .5, twice: mean .75, variance 8 * .0625 / 7 = 1/14, t(.975, 7) = 2.364624
    assert decision.difference.value == 0.75
    assert check(decision, "loss").value == pytest.approx(0.75 - 2.364624 * math.sqrt(1 / 14 / 8))
    names = ["loss", "prompts", "missing", "judge", "kl", "length", "truncated", "divergence/rm"]
    assert [found.name for found in decision.checks] == names
    # a gain of (t(.975, 7) + t(.8, 7)) standard errors is found with a chance of 80 %
    assert decision.detectable == pytest.approx((2.364624 + 0.896030) * math.sqrt(1 / 14 / 8), rel=1e-5)
    assert decision.level == pytest.approx(0.025)


def test_too_few_prompts_show_nothing_however_large_the_gain() -> None:
    # six prompts, all better: 1 of 64 sign patterns reaches the sum, which is less than .025
    decision = decide(answers("b", [[1, 1]] * 6), answers("c", [[0, 1], [0, 0]] * 3), LIMITS, RESAMPLING)
    assert check(decision, "loss").passed
    assert decision.refusals == ["prompts that the interval rests on: 6 (at least 8)"]
    # five prompts, all better: 1 of 32 patterns, more than .025
    fewer = decide(answers("b", [[1, 1]] * 5), answers("c", [[0, 1]] * 4 + [[0, 0]]), LIMITS, RESAMPLING)
    assert not check(fewer, "loss").passed
    single = decide(answers("b", [[1, 1]]), answers("c", [[0, 0]]), LIMITS, RESAMPLING)
    assert not check(single, "loss").passed


def test_an_interval_that_reaches_below_zero_is_a_loss_however_good_the_mean() -> None:
    # +1 six times, -1 twice: the mean is .5, the variance 8 * .75 / 7, and t(.975, 7) = 2.364624
    mixed = answers("mixed", [[1, 1]] * 6 + [[0, 0]] * 2)
    reference = answers("reference", [[0, 0]] * 6 + [[1, 1]] * 2)
    decision = decide(mixed, reference, LIMITS, RESAMPLING)
    assert decision.difference.value == 0.5
    assert check(decision, "loss").value == pytest.approx(0.5 - 2.364624 * math.sqrt(6 / 7 / 8))
    assert not decision.promote
    assert decision.refusals == [check(decision, "loss").words]
    assert "-0.274 to +1.274 over 8 prompts (must lie above 0)" in decision.refusals[0]
    assert not decide(mixed, reference, dataclasses.replace(LIMITS, tolerated_loss=0.25), RESAMPLING).promote
    assert decide(mixed, reference, dataclasses.replace(LIMITS, tolerated_loss=1.5), RESAMPLING).promote


def test_a_tolerated_loss_that_no_prompt_has_shown_is_not_thereby_excluded() -> None:
    # 40 equal prompts with rewards of 0 and 1: a loss of 2 % stays unseen with a chance of .98 ** 40 = .45
    same = [[1.0, 1.0], [0.0, 0.0]] * 20
    limits = dataclasses.replace(LIMITS, tolerated_loss=0.02)
    assert not decide(answers("a", same), answers("b", same), limits, RESAMPLING).promote
    # 400 prompts exclude it: the exact limit is ln(40) / 400 = .0092
    many = same * 10
    decision = decide(answers("a", many), answers("b", many), limits, RESAMPLING)
    assert decision.promote
    assert -0.02 < check(decision, "loss").value < -math.log(40) / 400


def test_every_limit_refuses_alone_and_says_its_number() -> None:
    shape = SHAPE
    cases = {
        "kl": ({"kl": np.full(shape, 5.5)}, 5.5),
        "length": ({"tokens": np.full(shape, 16.0)}, 1.6),
        "truncated": ({"truncated": np.array([[1, 0], [1, 0], [1, 0], [0, 0]] * 2)}, 3 / 8),
    }
    for name, (change, value) in cases.items():
        decision = decide(dataclasses.replace(BETTER, **change), CHAMPION, LIMITS, RESAMPLING)  # type: ignore[arg-type]
        assert [found.name for found in decision.checks if not found.passed] == [name]
        assert check(decision, name).value == pytest.approx(value)
        assert f"{value:.3g}" in decision.refusals[0]


def test_a_limit_is_passed_when_it_is_met_exactly() -> None:
    met = dataclasses.replace(BETTER, kl=np.full(SHAPE, 5.0), tokens=np.full(SHAPE, 15.0))
    assert decide(met, CHAMPION, LIMITS, RESAMPLING).promote


def test_much_shorter_answers_are_as_suspect_as_much_longer_ones() -> None:
    short = dataclasses.replace(BETTER, tokens=np.full(SHAPE, 5.0))
    decision = decide(short, CHAMPION, LIMITS, RESAMPLING)
    assert check(decision, "length").value == 2.0
    assert not decision.promote


def test_the_format_is_asked_only_where_one_is_given() -> None:
    formatted = dataclasses.replace(BETTER, formatted=np.array([[1, 1], [1, 1], [1, 1], [1, 0]] * 2))
    limits = dataclasses.replace(LIMITS, min_formatted=0.9)
    decision = decide(formatted, CHAMPION, limits, RESAMPLING)
    assert check(decision, "format").value == 7 / 8
    assert not decision.promote


def test_divergence_is_the_gain_of_the_score_beyond_the_gain_of_the_reward_in_deviations() -> None:
    # reward: champion 4 of 8, challenger 2 of 8: gain -1/4, deviation of 6 ones among 16 = sqrt(6/16 * 10/16)
    worse = answers("worse", [[0, 0], [0, 0], [1, 1], [0, 0]] * 2, scores={"rm": np.full(SHAPE, 3.0)})
    champion = dataclasses.replace(CHAMPION, scores={"rm": np.full(SHAPE, 1.0)})
    # score: 1 to 3: the deviation of eight 1s and eight 3s is 1, the gain 2 deviations
    expected = 2.0 - (-0.25) / math.sqrt(6 / 16 * 10 / 16)
    assert divergence(worse, champion, "rm") == pytest.approx(expected)
    decision = decide(worse, champion, LIMITS, RESAMPLING)
    assert [found.name for found in decision.checks if not found.passed] == ["loss", "divergence/rm"]


def test_equal_values_have_no_gain_and_unknown_ones_are_left_out() -> None:
    assert standardised_gain(np.ones((2, 2)), np.ones((2, 2))) == 0.0
    assert standardised_gain(np.array([[1.0, math.nan]]), np.array([[0.0, 0.0]])) == pytest.approx(1 / math.sqrt(2 / 9))


def test_several_candidates_share_one_chance_of_error() -> None:
    assert cautious(Resampling(500, 0.95, 3), 5) == Resampling(500, pytest.approx(0.99), 3)  # type: ignore[arg-type]
    assert cautious(Resampling(500, 0.95, 3), 1).confidence == pytest.approx(0.95)


def test_answers_to_other_prompts_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"other has \(1, 2\) and champion \(8, 2\)"):
        decide(answers("other", [[1, 1]]), CHAMPION, LIMITS, RESAMPLING)
    prompts = list(BETTER.prompts)
    prompts[3] = (3, "9+9?", "18")
    other = dataclasses.replace(BETTER, prompts=tuple(prompts))
    with pytest.raises(
        DataError, match=r"better answered '9\+9\?' \(gold answer '18'\) where champion answered '3\+1\?'"
    ):
        decide(other, CHAMPION, LIMITS, RESAMPLING)


def test_a_missing_reward_is_not_shown_to_be_right() -> None:
    nan = math.nan
    mine, theirs = np.array([[1, nan], [nan, nan], [0.5, 1]]), np.array([[0, 1], [nan, nan], [nan, 0]])
    # missing counts as 0 for the challenger and as 1 for the champion; nobody has a reward for the second prompt
    assert paired_differences(mine, theirs).tolist() == [0.5 - 0.5, 0.0, 0.75 - 0.5]


def test_a_model_whose_wrong_answers_have_no_reward_does_not_beat_one_that_is_right_more_often() -> None:
    # 30 % right and the rest without a reward, against 80 % right and the rest 0
    nan = math.nan
    skipping = answers("skipping", [[1.0]] * 12 + [[nan]] * 28)
    champion = answers("champion", [[1.0]] * 32 + [[0.0]] * 8)
    decision = decide(skipping, champion, dataclasses.replace(LIMITS, max_missing=1.0), RESAMPLING)
    assert decision.difference.value == pytest.approx(0.3 - 0.8)
    assert not decision.promote
    shares = decide(skipping, champion, LIMITS, RESAMPLING)
    assert check(shares, "missing").value == 0.7
    assert (
        "share of answers without a true reward: 0.7, and 0 of champion (at most 0.25)"
        in check(shares, "missing").words
    )


@pytest.mark.parametrize("reward", [1.0, 0.0, math.nan])
def test_a_judge_that_says_the_same_of_every_answer_promotes_nobody(reward: float) -> None:
    constant = [[reward, reward]] * 40
    limits = dataclasses.replace(LIMITS, tolerated_loss=0.5, max_missing=1.0)
    decision = decide(answers("mine", constant), answers("theirs", constant), limits, RESAMPLING)
    assert not check(decision, "judge").passed
    assert not decision.promote


def test_answers_without_a_token_are_a_length_and_no_error() -> None:
    empty = dataclasses.replace(BETTER, tokens=np.zeros(SHAPE))
    assert check(decide(empty, CHAMPION, LIMITS, RESAMPLING), "length").value == math.inf
    both = dataclasses.replace(CHAMPION, tokens=np.zeros(SHAPE))
    assert check(decide(empty, both, LIMITS, RESAMPLING), "length").value == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=12))
def test_an_equal_model_is_never_promoted_and_at_most_one_direction_is_a_gain(rows: list[tuple[float, float]]) -> None:
    mine = answers("mine", [[a] for a, _ in rows])
    theirs = answers("theirs", [[b] for _, b in rows])
    assert not check(decide(mine, mine, LIMITS, RESAMPLING), "loss").passed
    forth, back = (check(decide(*pair, LIMITS, RESAMPLING), "loss").passed for pair in ((mine, theirs), (theirs, mine)))
    assert not (forth and back)


ACC = BenchmarkMargin("arc", "acc", 0.05)


def judged_on(mine: list[float], theirs: list[float], margin: BenchmarkMargin = ACC, candidates: int = 1) -> Check:
    """Return the check of a benchmark with these values over documents."""
    key, limits = (margin.task, margin.metric), dataclasses.replace(LIMITS, benchmarks=(margin,))
    better = dataclasses.replace(BETTER, benchmarks={key: np.array(mine)})
    champion = dataclasses.replace(CHAMPION, benchmarks={key: np.array(theirs)})
    return check(decide(better, champion, limits, cautious(RESAMPLING, candidates)), margin.name)


def test_a_benchmark_may_fall_by_no_more_than_its_margin_by_hand() -> None:
    # 4 of 400 documents were lost and 2 won: mean -.005. The interval counts z^2 / 2 = 1.920729 documents with the worst loss, 1
    found = judged_on([1.0] * 200 + [0.0] * 200, [1.0] * 198 + [0.0] * 2 + [1.0] * 4 + [0.0] * 196)
    total, extra = 401.920729, 1.920729
    mean = (-2 - extra) / total
    spread = math.sqrt(((6 + extra) / total - mean**2) / (total - 1))
    assert found.value == pytest.approx(mean - 1.965927 * spread, abs=1e-6)  # t(.975, 399)
    assert (found.limit, found.passed) == (-0.05, True)
    assert found.words.startswith("acc of arc against champion: -0.005, 95 % interval -0.02")
    assert "over 400 documents (must lie above -0.05)" in found.words


def test_a_benchmark_on_which_the_candidate_lost_refuses_it() -> None:
    lost = judged_on([1.0] * 150 + [0.0] * 250, [1.0] * 200 + [0.0] * 200)
    assert not lost.passed
    assert "more documents" not in lost.words
    # equal answers to 20 documents bound a loss only at 1.92 / 21.92 and beyond, which is more than .05
    few = judged_on([1.0] * 10 + [0.0] * 10, [1.0] * 10 + [0.0] * 10)
    assert not few.passed
    assert few.value < -1.920729 / 21.920729
    assert few.words.endswith("; more documents may show it, since the loss itself is within the margin")


@pytest.mark.parametrize(("candidates", "documents"), [(1, 92), (8, 178)])
def test_equal_answers_show_a_margin_of_a_twentieth_from_so_many_documents(candidates: int, documents: int) -> None:
    fewer, enough = [1.0] * (documents - 1), [1.0] * documents
    assert not judged_on(fewer, fewer, candidates=candidates).passed
    assert judged_on(enough, enough, candidates=candidates).passed


def test_the_level_of_a_benchmark_is_divided_among_the_candidates() -> None:
    mine, theirs = [1.0] * 200 + [0.0] * 200, [1.0] * 204 + [0.0] * 196
    one, five = judged_on(mine, theirs), judged_on(mine, theirs, candidates=5)
    assert "95 % interval" in one.words
    assert "99 % interval" in five.words
    assert five.value < one.value


def test_a_metric_of_which_less_is_better_is_turned_around() -> None:
    margin = BenchmarkMargin("text", "error", 0.1, lower_is_better=True)
    assert judged_on([0.0] * 300, [1.0] * 150 + [0.0] * 150, margin).passed
    assert not judged_on([1.0] * 150 + [0.0] * 150, [0.0] * 300, margin).passed


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ({}, "the evaluation of better has no metric 'acc' of 'arc'; it has: none"),
        ({("arc", "acc_norm"): np.ones(3)}, "it has: arc acc_norm"),
        ({("arc", "acc"): np.ones(3)}, "better has 3 documents and champion has 4"),
        ({("arc", "acc"): np.ones(0)}, "acc of arc is no mean over documents"),
    ],
)
def test_a_benchmark_that_cannot_be_compared_is_refused_in_words(
    mine: dict[tuple[str, str], np.ndarray], words: str
) -> None:
    limits = dataclasses.replace(LIMITS, benchmarks=(ACC,))
    champion = dataclasses.replace(CHAMPION, benchmarks={("arc", "acc"): np.ones(4)})
    with pytest.raises(DataError, match=words):
        decide(dataclasses.replace(BETTER, benchmarks=mine), champion, limits, RESAMPLING)


def test_prompts_in_groups_count_as_groups() -> None:
    grouped = replace(BETTER, groups=tuple("aabbccdd"))
    decision = decide(grouped, CHAMPION, LIMITS, RESAMPLING)
    enough = check(decision, "prompts")
    assert (enough.value, enough.passed) == (4, False)
    assert enough.words == "groups of prompts that the interval rests on: 4 (at least 8)"
    assert "over 8 prompts in 4 groups (must lie above" in check(decision, "loss").words
    # four signs cannot reach 2.5 %: the least p is near 1/16
    assert not check(decision, "loss").passed
    assert check(decide(BETTER, CHAMPION, LIMITS, RESAMPLING), "loss").passed
