"""Surrogates that bound an update in other ways than by a clip of each token's ratio.

Example:
    A token whose probability rose from 0.2 to 0.5 is 0.3 away in total variation, so a limit of 0.2 stops a further rise:

    >>> old, new, up = torch.tensor([[0.2]]).log(), torch.tensor([[0.5]]).log(), torch.ones(1, 1)
    >>> divergence_loss(new, old, up, "tv", 0.2, 0.2).loss.item()
    0.0
    >>> round(soft_gate_loss(torch.ones(1, 1), up, 1.0, 1.05).loss.item(), 4)
    -2.0
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.objectives.reduce import LOG_RATIO_LIMIT, row_means
from posttrain.objectives.surrogate import SurrogateLoss


def soft_gate_loss(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> SurrogateLoss:
    """Return -A * (4 / tau) * sigma(tau * (rho - 1)), [batch, time], with tau by the sign of A (SAPO, 2511.20347, eq. 5 and 6).

    The gradient is that of -A * rho at rho = 1, and fades smoothly on both sides of it.
    """
    tau = torch.where(advantages > 0, torch.full_like(ratio, tau_positive), torch.full_like(ratio, tau_negative))
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return SurrogateLoss(-advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1)), never, never)


def geometric_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float
) -> SurrogateLoss:
    """Return -A * exp(mean over tokens of the clipped log-ratio), the same for each token of a row [batch, time] (GMPO, 2507.20673).

    Log-ratios are clipped token by token to at most clip_high if A > 0, and to at least -clip_low if A < 0.
    """
    difference = torch.where(loss_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # one factor for the row: a NaN outside the mask would reach the gradient of every token
    advantages = torch.where(loss_mask, advantages, torch.zeros_like(advantages))
    clipped_low = (difference.detach() < -clip_low) & (advantages < 0)
    clipped_high = (difference.detach() > clip_high) & (advantages > 0)
    bounded = torch.where(clipped_low, -clip_low, torch.where(clipped_high, clip_high, difference))
    loss = -advantages * row_means(bounded, loss_mask).exp()[:, None]
    return SurrogateLoss(loss, clipped_low, clipped_high)


def divergence_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    kind: Literal["tv", "kl"],
    limit_low: float,
    limit_high: float,
) -> SurrogateLoss:
    """Return -A * rho, [batch, time], without the tokens that leave the trust region (DPPO, 2602.04879, eq. 11 to 14).

    A token leaves it if its probability moves in the direction of A (up: limit_high, down: limit_low) and has moved further than the limit.
    The divergence is that of "this token or any other": |pi - mu|, or KL(mu || pi) of the two outcomes.
    """
    difference = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    moved = binary_divergence(logprobs.detach(), old_logprobs, kind)
    up, down = difference.detach() > 0, difference.detach() < 0
    clipped_high = (advantages > 0) & up & (moved > limit_high)
    clipped_low = (advantages < 0) & down & (moved > limit_low)
    loss = torch.where(clipped_low | clipped_high, torch.zeros_like(logprobs), -advantages * difference.exp())
    return SurrogateLoss(loss, clipped_low, clipped_high)


def binary_divergence(logprobs: Tensor, old_logprobs: Tensor, kind: Literal["tv", "kl"]) -> Tensor:
    """Return the divergence [batch, time] between two policies for the outcomes "this token" and "any other", in float64."""
    new, old = (x.double().clamp(min=-(LOG_RATIO_LIMIT**2), max=-1e-12) for x in (logprobs, old_logprobs))
    if kind == "tv":
        return (new.exp() - old.exp()).abs()
    # log(1 - p); at p near 1 the difference 1 - exp(log p) would lose its digits
    other_new, other_old = (-new.expm1()).log(), (-old.expm1()).log()
    return old.exp() * (old - new) + other_old.exp() * (other_old - other_new)
