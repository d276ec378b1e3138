"""Several rewards into one: the weighted sum, or the weighted sum of each reward's standing within its group."""

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
    """Per answer; NaN where a source with a weight has no reward for it.

    sum: sum of w R. group_normalised: sum of w (R - mean) / std over the answers of the group that the source judged, so that a reward
    counts by its weight and not by its scale (2601.05242); a source that is constant within a group says nothing there.
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
    standing = group_advantages(known, torch.tensor(groups), "group_z").tolist()
    return [None if value is None else place for value, place in zip(values, standing, strict=True)]
