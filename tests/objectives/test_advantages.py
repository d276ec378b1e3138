"""Group advantages: by hand, invariances, and rewards that are missing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import ConfigError
from posttrain.objectives.advantages import group_advantages, informative

NAN = math.nan
GROUPED = ["group_mean", "group_z", "leave_one_out"]


def advantages(rewards: list[float], groups: list[int], how: str) -> list[float]:
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), how).tolist()


def test_by_hand() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 3.0, 5.0], [7, 7, 7, 2, 2]
    assert advantages(rewards, groups, "group_mean") == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1.0, 1.0])
    std = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 3)
    expected = [2 / 3 / (std + 1e-6), -1 / 3 / (std + 1e-6), -1 / 3 / (std + 1e-6), -1 / (1 + 1e-6), 1 / (1 + 1e-6)]
    assert advantages(rewards, groups, "group_z") == pytest.approx(expected, abs=1e-12)
    # leave-one-out: R - mean of the others
    assert advantages(rewards, groups, "leave_one_out") == pytest.approx([1.0, -0.5, -0.5, -2.0, 2.0])


rewards_of_a_group = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6)


@given(rewards_of_a_group, st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("how", GROUPED)
def test_shift_of_a_group_changes_nothing(how: str, rewards: list[float], shift: float) -> None:
    groups = [3] * len(rewards)
    moved = advantages([r + shift for r in rewards], groups, how)
    if max(rewards) - min(rewards) > 1e-3 or how != "group_z":
        assert moved == pytest.approx(advantages(rewards, groups, how), abs=1e-6)


@given(rewards_of_a_group)
@settings(max_examples=40, deadline=None)
def test_only_the_standard_deviation_makes_scale_irrelevant(rewards: list[float]) -> None:
    groups = [0] * len(rewards)
    scaled = [4 * r for r in rewards]
    assert advantages(scaled, groups, "group_mean") == pytest.approx(
        [4 * a for a in advantages(rewards, groups, "group_mean")]
    )
    if max(rewards) - min(rewards) > 0.1:
        assert advantages(scaled, groups, "group_z") == pytest.approx(advantages(rewards, groups, "group_z"), rel=1e-3)


@given(rewards_of_a_group)
@settings(max_examples=40, deadline=None)
def test_leave_one_out_is_the_mean_scaled(rewards: list[float]) -> None:
    size, groups = len(rewards), [0] * len(rewards)
    expected = [size / (size - 1) * a for a in advantages(rewards, groups, "group_mean")]
    others = [r - (sum(rewards) - r) / (size - 1) for r in rewards]
    assert advantages(rewards, groups, "leave_one_out") == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(others, abs=1e-9)


@pytest.mark.parametrize("how", GROUPED)
@pytest.mark.parametrize("constant", [0.1, 0.3, 1e6 + 0.1, -7.7])
def test_a_constant_group_is_exactly_zero(how: str, constant: float) -> None:
    rewards = torch.full((7,), constant, dtype=torch.float32)
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.long), how).tolist() == [0.0] * 7


@pytest.mark.parametrize("how", GROUPED)
def test_a_missing_reward_leaves_the_statistics_and_gets_zero(how: str) -> None:
    with_missing = advantages([1.0, NAN, 0.0, 4.0, 2.0], [0, 0, 0, 1, 1], how)
    without = advantages([1.0, 0.0, 4.0, 2.0], [0, 0, 1, 1], how)
    assert with_missing[1] == 0.0
    assert [with_missing[i] for i in (0, 2, 3, 4)] == without


@pytest.mark.parametrize("how", GROUPED)
def test_groups_with_one_or_no_known_reward_are_zero(how: str) -> None:
    assert advantages([5.0, NAN, NAN], [0, 0, 0], how) == [0.0] * 3
    assert advantages([NAN, NAN], [0, 0], how) == [0.0] * 2


@pytest.mark.parametrize("how", GROUPED)
def test_a_group_of_one_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match="group of one"):
        advantages([1.0, 0.0, 1.0], [0, 0, 1], how)


def test_equal_prompts_with_different_ids_stay_apart() -> None:
    assert advantages([1.0, 0.0, 9.0, 8.0], [4, 4, 5, 5], "group_mean") == [0.5, -0.5, 0.5, -0.5]


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    rewards, groups = [1.0, 0.0, NAN, 3.0, 5.0, 2.5], [0, 0, 0, 1, 1, 1]
    straight = advantages(rewards, groups, "group_z")
    permuted = advantages([rewards[i] for i in order], [groups[i] for i in order], "group_z")
    assert permuted == pytest.approx([straight[i] for i in order], abs=1e-12)


def test_informative_needs_two_different_known_rewards() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 1.0, NAN, NAN])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert informative(rewards, groups).tolist() == [False, False, True, True, False, False, False, False]


def test_group_rate_divides_by_the_success_rate() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, math.nan, 0.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = group_advantages(rewards, groups, "group_rate").tolist()
    # rates 1/4 and 2/3 (a missing reward counts for nothing); no success gives no signal
    assert found == pytest.approx([3.0, -1.0, -1.0, -1.0, 0.5, 0.5, -1.0, 0.0, 0.0, 0.0], abs=1e-6)
    # the sum over a group of A_i S_i / N is the mean score of its right answers minus the mean score of all (2602.02710)
    scores = [0.3, -1.1, 0.8, 0.5]
    weighted = sum(a * s for a, s in zip(found[:4], scores, strict=True)) / 4
    assert weighted == pytest.approx(scores[0] - sum(scores) / 4, abs=1e-6)


def test_group_rate_refuses_a_negative_reward() -> None:
    with pytest.raises(ConfigError, match=r"no reward may be negative; one is -0\.5"):
        group_advantages(torch.tensor([1.0, -0.5]), torch.tensor([0, 0]), "group_rate")
