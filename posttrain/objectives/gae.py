"""Generalised advantage estimation over response tokens (1506.02438), and the clipped value loss of PPO."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [batch, time], 0 outside the mask.

    rewards, values: [batch, time]. mask: [batch, time] bool. After the last response token the value is 0.
    Masked tokens hand the running value and advantage through: inserting them anywhere changes nothing.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        keep = mask[:, t]
        next_advantage = torch.where(keep, advantage, next_advantage)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, advantage, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values` [batch, time] with mean 0 and population standard deviation 1 over the mask; 0 outside it, and if all are equal."""
    known = values[mask].double()
    # the mean of equal numbers may be another number by rounding, and the difference would be blown up to 1
    if not len(known) or known.max() == known.min():
        return torch.zeros_like(values)
    centred, variance = values.double() - known.mean(), known.var(correction=0)
    return torch.where(mask, centred * torch.rsqrt(variance + 1e-8), 0.0).to(values.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Per-token 0.5 * max((v - R)^2, (clip(v, old +- clip) - R)^2), [batch, time]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
