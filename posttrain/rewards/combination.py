"""Combine several rewards into one: the weighted sum, or the weighted sum of rewards normalised within their group.

Example:
    The first source counts twice; the second does not apply to the last answer, and is left out of its sum:

    >>> combined({"a": [1.0, 0.0], "b": [0.5, None]}, {"a": 2.0, "b": 1.0}, groups=[0, 0], how="sum")
    [2.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from posttrain.algorithms.axes import RewardCombination
from posttrain.objectives.advantages import group_advantages


def combined(
    rewards: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    groups: Sequence[int],
    how: RewardCombination,
) -> list[float]:
    """Return one reward per answer: over the sources with a weight that apply to it. NaN if none applies, or if one failed.

    None means that the source does not apply to the answer, such as a reward for another kind of task; NaN means that it failed.

    Args:
        how: `sum` is the sum of w R. `group_normalised` is the sum of w (R - mean) / std over the answers of the group that the source
            scored, so that a reward counts by its weight and not by its scale (2601.05242). A source that is constant within a group
            contributes 0 there.
    """
    if how == "group_normalised":
        rewards = {name: _within_groups(rewards[name], groups) for name in weights}
    totals = [math.nan] * len(groups)
    for i in range(len(groups)):
        given = [weights[n] * value for n in sorted(weights) if weights[n] and (value := rewards[n][i]) is not None]
        totals[i] = sum(given) if given else math.nan
    return totals


def known(value: float | None) -> float | None:
    """Return the reward, None if the source failed on the answer or does not apply to it."""
    return None if value is None or math.isnan(value) else value


def _within_groups(values: Sequence[float | None], groups: Sequence[int]) -> list[float | None]:
    present = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    normalised = group_advantages(present, torch.tensor(groups), "group_z").tolist()
    return [score if known(value) is not None else value for value, score in zip(values, normalised, strict=True)]
