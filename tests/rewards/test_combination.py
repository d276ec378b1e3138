"""Several rewards into one, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.gae import whiten
from posttrain.rewards.combination import combined

# two groups of three answers; the reward model's scale is a hundred times that of the format
RM, FORMAT = [100.0, 300.0, 200.0, 5.0, 5.0, 5.0], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
GROUPS = [7, 7, 7, 2, 2, 2]


def test_the_weighted_sum_and_its_gaps() -> None:
    rewards = {"a": [1.0, None, 3.0], "b": [10.0, 20.0, None]}
    totals = combined(rewards, {"a": 0.5, "b": 2.0}, [0, 0, 0], "sum")
    # what does not apply to an answer is left out of its sum: 2 * 20, and 0.5 * 3
    assert totals == [20.5, 40.0, 1.5]
    # what failed on it leaves the answer without a reward, and so does an answer to which nothing applies
    failed = combined({"a": [1.0, math.nan, None], "b": [10.0, 20.0, None]}, {"a": 0.5, "b": 2.0}, [0, 0, 0], "sum")
    assert failed[0] == 20.5
    assert all(math.isnan(total) for total in failed[1:])
    # a source that only watches cannot make a reward missing
    assert combined(rewards, {"a": 0.0, "b": 1.0}, [0, 0, 0], "sum")[:2] == [10.0, 20.0]


def test_normalised_within_the_group_a_reward_counts_by_its_weight() -> None:
    totals = combined({"rm": RM, "format": FORMAT}, {"rm": 1.0, "format": 2.0}, GROUPS, "group_normalised")
    # rm in group 7: mean 200, std sqrt(20000/3) = 81.6497; format: mean 1/3, std sqrt(2)/3 = 0.471405
    z = 100 / math.sqrt(20000 / 3)
    first = [
        -z + 2 * (2 / 3) / (math.sqrt(2) / 3),
        z - 2 * (1 / 3) / (math.sqrt(2) / 3),
        -2 * (1 / 3) / (math.sqrt(2) / 3),
    ]
    assert totals[:3] == pytest.approx(first, abs=2e-5)
    # in group 2 all answers please the reward model alike, so that it says nothing there
    second = [2 * (-2 / 3) / (math.sqrt(2) / 3)] + [2 * (1 / 3) / (math.sqrt(2) / 3)] * 2
    assert totals[3:] == pytest.approx(second, abs=2e-5)
    # the scale of a source is of no account; in a sum it decides everything
    shrunk = combined(
        {"rm": [r / 1000 for r in RM], "format": FORMAT}, {"rm": 1.0, "format": 2.0}, GROUPS, "group_normalised"
    )
    assert shrunk == pytest.approx(totals, abs=5e-5)
    assert combined({"rm": RM, "format": FORMAT}, {"rm": 1.0, "format": 2.0}, GROUPS, "sum")[:3] == [
        102.0,
        300.0,
        200.0,
    ]


def test_what_one_source_does_not_apply_to_leaves_its_statistics_and_its_sum() -> None:
    rewards = {"rm": [1.0, None, 3.0, None], "format": [1.0, 1.0, 0.0, 0.0]}
    totals = combined(rewards, {"rm": 1.0, "format": 0.5}, [0] * 4, "group_normalised")
    # rm knows 1 and 3: -1 and 1. format knows all: mean 1/2, std 1/2
    assert totals[0] == pytest.approx(-1 + 0.5, abs=1e-5)
    assert totals[2] == pytest.approx(1 - 0.5, abs=1e-5)
    assert totals[1] == pytest.approx(0.5, abs=1e-5)
    assert totals[3] == pytest.approx(-0.5, abs=1e-5)
    failed = combined(
        rewards | {"rm": [1.0, math.nan, 3.0, None]}, {"rm": 1.0, "format": 0.5}, [0] * 4, "group_normalised"
    )
    assert math.isnan(failed[1])
    assert [failed[0], *failed[2:]] == pytest.approx([totals[0], *totals[2:]])
    # a source without weight is not asked, and neither its gaps nor its spread matter
    assert combined(rewards, {"rm": 0.0, "format": 0.5}, [0] * 4, "group_normalised") == pytest.approx(
        [0.5, 0.5, -0.5, -0.5], abs=1e-5
    )


def test_groups_in_which_every_source_is_constant_or_silent_are_exactly_zero_or_missing() -> None:
    rewards = {"a": [2.0, 2.0, None, None], "b": [0.1, 0.1, 0.1, 0.1]}
    totals = combined(rewards, {"a": 1.0, "b": 1.0}, [0, 0, 1, 1], "group_normalised")
    assert totals == [0.0, 0.0, 0.0, 0.0]
    silent = combined({"a": [None, None], "b": [None, None]}, {"a": 1.0, "b": 1.0}, [0, 0], "group_normalised")
    assert all(math.isnan(total) for total in silent)


def test_gdpo_keeps_apart_groups_that_differ_in_one_reward_and_in_both() -> None:
    """2601.05242: z in each group, summed, then over the batch."""
    totals = combined(
        {"a": [0.0, 1.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 1.0]}, {"a": 1.0, "b": 1.0}, [0, 0, 1, 1], "group_normalised"
    )
    assert totals == pytest.approx([-1, 1, -2, 2], abs=1e-5)
    # mean 0, population std sqrt((1 + 1 + 4 + 4) / 4) = 1.58114
    normalised = whiten(torch.tensor(totals)[:, None], torch.ones(4, 1, dtype=torch.bool))[:, 0]
    assert normalised.tolist() == pytest.approx([-0.632456, 0.632456, -1.264911, 1.264911], abs=1e-4)
