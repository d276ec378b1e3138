"""Advantages of whole responses from rewards and groups. Missing rewards (NaN) leave the statistics and get advantage 0."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.specs import GroupAdvantage
from posttrain.errors import ConfigError

STD_EPSILON = 1e-6


def group_advantages(rewards: Tensor, groups: Tensor, how: GroupAdvantage) -> Tensor:
    """Advantage [batch] of each response among the responses of its group.

    rewards: [batch], NaN where missing. groups: [batch] integer ids; equal prompts with different ids stay apart.
    group_mean: R - mean. group_z: divided by the population std + 1e-6, exactly 0 when max = min (2402.03300).
    leave_one_out: G/(G-1) * (R - mean), the mean of the others as baseline (2402.14740).
    Raises ConfigError for a group of one, which has no baseline.
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
    variance = _per_group(centred.square(), index, sizes) / count.clamp(min=1)
    return centred / (variance.sqrt()[index] + STD_EPSILON)


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """True [batch] where the response's group has at least two different known rewards, so that it carries a signal."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    present = ~torch.isnan(rewards)
    inf = torch.full((len(sizes),), torch.inf, dtype=rewards.dtype)
    low = inf.clone().scatter_reduce(0, index, torch.where(present, rewards, torch.inf), "amin")
    high = (-inf).scatter_reduce(0, index, torch.where(present, rewards, -torch.inf), "amax")
    return (high > low)[index]


def _per_group(values: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(len(sizes), dtype=values.dtype).index_add(0, index, values)
