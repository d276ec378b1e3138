"""Combine several rewards into one: the weighted sum, or the weighted sum of rewards normalised within their group.

Example:
    The first source counts twice; the second has no reward for the last answer:

    >>> combined({"a": [1.0, 0.0], "b": [0.5, None]}, {"a": 2.0, "b": 1.0}, groups=[0, 0], how="sum")
    [2.5, nan]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from posttrain.algorithms.specs import RewardCombination
from posttrain.objectives.advantages import group_advantages


def combined(
    rewards: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    groups: Sequence[int],
    how: RewardCombination,
) -> list[float]:
    """Return one reward per answer; NaN if a source with a non-zero weight has no reward for it.

    Args:
        how: `sum` is the sum of w R. `group_normalised` is the sum of w (R - mean) / std over the answers of the group that the source
            scored, so that a reward counts by its weight and not by its scale (2601.05242). A source that is constant within a group
            contributes 0 there.
    """
    if how == "group_normalised":
        rewards = {name: _within_groups(rewards[name], groups) for name in weights}
    totals = [0.0] * len(groups)
    for name in sorted(weights):
        for i, value in enumerate(rewards[name]) if weights[name] else ():
            totals[i] += weights[name] * (math.nan if value is None else value)
    return totals


def _within_groups(values: Sequence[float | None], groups: Sequence[int]) -> list[float | None]:
    known = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    normalised = group_advantages(known, torch.tensor(groups), "group_z").tolist()
    return [None if value is None else score for value, score in zip(values, normalised, strict=True)]
