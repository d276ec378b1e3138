"""Advantages of whole responses from rewards and groups. Missing rewards (NaN) are excluded from the statistics and get advantage 0.

Example:
    >>> rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    >>> group_advantages(rewards, groups, "group_mean").tolist()
    [0.5, -0.5, -0.5, 0.5]
    >>> group_advantages(rewards, groups, "leave_one_out").tolist()
    [1.0, -1.0, -1.0, 1.0]
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.axes import GroupAdvantage
from posttrain.errors import ConfigError

STD_EPSILON = 1e-6


def group_advantages(rewards: Tensor, groups: Tensor, how: GroupAdvantage) -> Tensor:
    """Return the advantage [batch] of each response relative to its group.

    Args:
        rewards: [batch], NaN if missing.
        groups: [batch] integer ids; equal prompts with different ids are different groups.
        how: `group_mean` is R - mean. `group_z` also divides by the population std + 1e-6, and is exactly 0 if max = min (2402.03300).
            `leave_one_out` is G/(G-1) * (R - mean), with the mean of the other responses as baseline (2402.14740).
            `group_rate` is (R - mean) / mean, and 0 if nothing was rewarded (2602.02710).

    Raises:
        ConfigError: a group has one response and so no baseline, or `group_rate` meets a negative reward.
    """
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    if int(sizes.min()) < 2:
        raise ConfigError(
            f"advantage {how!r} compares answers to one prompt: a group of one has no baseline; sample at least 2"
        )
    present = ~torch.isnan(rewards)
    known = torch.where(present, rewards, torch.zeros_like(rewards))
    count = _per_group(present.to(rewards.dtype), index, sizes)
    mean = _per_group(known, index, sizes) / count.clamp(min=1)
    centred = torch.where(present, rewards - mean[index], torch.zeros_like(rewards))
    constant = ~informative(rewards, groups)
    centred = torch.where(constant, torch.zeros_like(centred), centred)
    if how == "group_mean":
        return centred
    if how == "leave_one_out":
        others = (count - 1).clamp(min=1)
        return centred * (count / others)[index]
    if how == "group_rate":
        if known.min() < 0:
            raise ConfigError(
                f"advantage 'group_rate' divides by the group's mean reward, so no reward may be negative; one is {float(known.min()):g}."
                " Use rewards from 0 to 1, or advantage: group_mean"
            )
        return torch.where(mean[index] > 0, centred / mean[index], torch.zeros_like(centred))
    variance = _per_group(centred.square(), index, sizes) / count.clamp(min=1)
    return centred / (variance.sqrt()[index] + STD_EPSILON)


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return True [batch] if the response's group has at least two different known rewards, so that it carries a signal."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    present = ~torch.isnan(rewards)
    inf = torch.full((len(sizes),), torch.inf, dtype=rewards.dtype)
    low = inf.clone().scatter_reduce(0, index, torch.where(present, rewards, torch.inf), "amin")
    high = (-inf).scatter_reduce(0, index, torch.where(present, rewards, -torch.inf), "amax")
    return (high > low)[index]


def _per_group(values: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(len(sizes), dtype=values.dtype).index_add(0, index, values)
