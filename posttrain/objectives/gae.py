"""Generalised advantage estimation over response tokens (1506.02438), and the clipped value loss of PPO.

Example:
    With gamma = lam = 1 the advantage is the return minus the value:

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 0.5]])
    >>> advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[0.75, 0.5]], [[1.0, 1.0]])
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both [batch, time], 0 outside the mask.

    The value after the last response token is 0. Masked tokens pass the running value and advantage through, so inserting them changes
    nothing.

    Args:
        rewards: [batch, time].
        values: [batch, time].
        mask: [batch, time] bool.
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


def whiten(values: Tensor, mask: Tensor, per_row: bool = False) -> Tensor:
    """Normalise `values` [batch, time] to mean 0 and population standard deviation 1 over the mask.

    The result is 0 outside the mask, and everywhere if all values are equal.

    Args:
        per_row: every row counts once in mean and deviation, however many values it has.
    """
    known = values[mask].double()
    # rounding can make the mean of equal numbers differ from them, and the division would scale that difference to 1
    if not len(known) or known.max() == known.min():
        return torch.zeros_like(values)
    centred, variance = values.double() - known.mean(), known.var(correction=0)
    if per_row:
        share = (mask.double() / mask.sum(-1, keepdim=True).clamp(min=1))[mask]
        share = share / share.sum()
        centred = values.double() - (share * known).sum()
        variance = (share * centred[mask].square()).sum()
    return torch.where(mask, centred * torch.rsqrt(variance + 1e-8), 0.0).to(values.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return the per-token loss 0.5 * max((v - R)^2, (clip(v, old +- clip) - R)^2), [batch, time]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
