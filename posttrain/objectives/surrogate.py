"""Importance ratios and the surrogate losses of the PPO and GRPO families."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.algorithms.specs import Mismatch, Ratio, Surrogate
from posttrain.objectives.reduce import LOG_RATIO_LIMIT, row_means


def importance_ratio(logprobs: Tensor, old: Tensor, mask: Tensor, ratio: Ratio) -> Tensor:
    """exp(logprobs - old) per token, or one length-normalised ratio per sequence (2507.18071); all [batch, time].

    The sequence ratio s is returned as sg[s] * exp(lp - sg[lp]): the value of s, and the gradient of s * mean over its tokens.
    """
    difference = torch.where(mask, logprobs - old, torch.zeros_like(logprobs))
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if ratio == "token":
        return difference.exp()
    sequence = row_means(difference.detach(), mask).exp()
    own = torch.where(mask, logprobs - logprobs.detach(), torch.zeros_like(logprobs))
    return sequence[:, None] * own.exp()


@dataclass(frozen=True)
class SurrogateLoss:
    """Per-token loss and where the clip took the gradient away; all [batch, time]."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def surrogate_loss(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, kind: Surrogate = "clip"
) -> SurrogateLoss:
    """clip: max(-A rho, -A clip(rho, 1 - low, 1 + high)) (1707.06347). weight: -sg[clip(rho)] A log p (2506.13585)."""
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped_low = ratio.detach() < 1 - clip_low
    clipped_high = ratio.detach() > 1 + clip_high
    if kind == "weight":
        return SurrogateLoss(-bounded.detach() * advantages * logprobs, clipped_low, clipped_high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    return SurrogateLoss(loss, clipped_low & (advantages < 0), clipped_high & (advantages > 0))


def mismatch_weight(old: Tensor, sampled: Tensor, how: Mismatch, cap: float) -> Tensor:
    """Weight [batch, time] for tokens whose sampler was not quite the policy: exp(old - sampled), truncated at `cap` or masked outside
    [1/cap, cap]."""
    weight = (old - sampled).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if how == "truncate":
        return weight.clamp(max=cap)
    if how == "mask":
        return torch.where((weight >= 1 / cap) & (weight <= cap), torch.ones_like(weight), torch.zeros_like(weight))
    return torch.ones_like(weight)
