"""The gate's arithmetic, every number written out."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.promotion.decision import (
    Answers,
    Check,
    Decision,
    Limits,
    cautious,
    decide,
    divergence,
    standardised_gain,
)
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Resampling

LIMITS = Limits(tolerated_loss=0.0, max_kl=5.0, max_length_ratio=1.5, max_truncated=0.25, max_divergence=0.5)
RESAMPLING = Resampling(2000, 0.95, 0)


def answers(name: str, reward: list[list[float]], **fields: object) -> Answers:
    table = np.array(reward, float)
    given = {
        "scores": {"rm": table.copy()},
        "kl": np.full(table.shape, 2.0),
        "tokens": np.full(table.shape, 10.0),
        "truncated": np.zeros(table.shape),
    } | fields
    return Answers(name, table, **given)  # type: ignore[arg-type]


def check(decision: Decision, name: str) -> Check:
    return next(found for found in decision.checks if found.name == name)


CHAMPION = answers("champion", [[0, 1], [0, 0], [1, 1], [0, 1]])
BETTER = answers("better", [[1, 1], [1, 1], [1, 1], [1, 1]])


def test_a_model_that_is_better_on_every_prompt_passes_all_checks() -> None:
    decision = decide(BETTER, CHAMPION, LIMITS, RESAMPLING)
    assert decision.promote
    assert decision.refusals == []
    # per prompt .5, 1, 0, .5: the mean is .5 and no draw of four prompts has a mean below 0
    assert decision.difference.value == 0.5
    assert 0.0 <= check(decision, "loss").value <= 0.25
    assert [found.name for found in decision.checks] == ["loss", "kl", "length", "truncated", "divergence/rm"]


def test_an_interval_that_reaches_below_zero_is_a_loss_however_good_the_mean() -> None:
    # +1, +1, +1, -1 per prompt: the mean is +.5; four draws are all -1 once in 256, two or more -1 in 67 of 256 draws
    mixed = answers("mixed", [[1, 1], [1, 1], [1, 1], [0, 0]])
    reference = answers("reference", [[0, 0], [0, 0], [0, 0], [1, 1]])
    decision = decide(mixed, reference, LIMITS, RESAMPLING)
    assert decision.difference.value == 0.5
    assert check(decision, "loss").value == -0.5
    assert not decision.promote
    assert decision.refusals == [check(decision, "loss").words]
    assert "-0.5 to +1" in decision.refusals[0]
    tolerant = decide(mixed, reference, dataclasses.replace(LIMITS, tolerated_loss=0.5), RESAMPLING)
    assert tolerant.promote


def test_every_limit_refuses_alone_and_says_its_number() -> None:
    shape = (4, 2)
    cases = {
        "kl": ({"kl": np.full(shape, 5.5)}, 5.5),
        "length": ({"tokens": np.full(shape, 16.0)}, 1.6),
        "truncated": ({"truncated": np.array([[1, 0], [1, 0], [1, 0], [0, 0]])}, 3 / 8),
    }
    for name, (change, value) in cases.items():
        decision = decide(dataclasses.replace(BETTER, **change), CHAMPION, LIMITS, RESAMPLING)  # type: ignore[arg-type]
        assert [found.name for found in decision.checks if not found.passed] == [name]
        assert check(decision, name).value == pytest.approx(value)
        assert f"{value:.3g}" in decision.refusals[0]


def test_a_limit_is_passed_when_it_is_met_exactly() -> None:
    met = dataclasses.replace(BETTER, kl=np.full((4, 2), 5.0), tokens=np.full((4, 2), 15.0))
    assert decide(met, CHAMPION, LIMITS, RESAMPLING).promote


def test_much_shorter_answers_are_as_suspect_as_much_longer_ones() -> None:
    short = dataclasses.replace(BETTER, tokens=np.full((4, 2), 5.0))
    decision = decide(short, CHAMPION, LIMITS, RESAMPLING)
    assert check(decision, "length").value == 2.0
    assert not decision.promote


def test_the_format_is_asked_only_where_one_is_given() -> None:
    formatted = dataclasses.replace(BETTER, formatted=np.array([[1, 1], [1, 1], [1, 1], [1, 0]]))
    limits = dataclasses.replace(LIMITS, min_formatted=0.9)
    decision = decide(formatted, CHAMPION, limits, RESAMPLING)
    assert check(decision, "format").value == 7 / 8
    assert not decision.promote


def test_divergence_is_the_gain_of_the_score_beyond_the_gain_of_the_reward_in_deviations() -> None:
    # reward: champion 4 of 8, challenger 2 of 8: gain -1/4, deviation of 6 ones among 16 = sqrt(6/16 * 10/16)
    worse = answers("worse", [[0, 0], [0, 0], [1, 1], [0, 0]], scores={"rm": np.full((4, 2), 3.0)})
    champion = dataclasses.replace(CHAMPION, scores={"rm": np.full((4, 2), 1.0)})
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
    with pytest.raises(DataError, match=r"other has \(1, 2\) and champion \(4, 2\)"):
        decide(answers("other", [[1, 1]]), CHAMPION, LIMITS, RESAMPLING)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=12))
def test_nobody_loses_against_himself_and_both_directions_are_never_a_strict_gain(
    rows: list[tuple[float, float]],
) -> None:
    mine = answers("mine", [[a] for a, _ in rows])
    theirs = answers("theirs", [[b] for _, b in rows])
    assert check(decide(mine, mine, LIMITS, RESAMPLING), "loss").value == 0.0
    forth, back = (check(decide(*pair, LIMITS, RESAMPLING), "loss").value for pair in ((mine, theirs), (theirs, mine)))
    assert not (forth > 0 and back > 0)
