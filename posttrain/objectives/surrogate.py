"""Importance ratios and the surrogate losses of the PPO and GRPO families.

Example:
    Ratios 2 and 1/2 with advantage 1 and clip 0.2: the first is clipped to 1.2, the second keeps its gradient:

    >>> logprobs = torch.tensor([[2.0, 0.5]]).log()
    >>> ratio = importance_ratio(logprobs, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), "token")
    >>> surrogate = surrogate_loss(ratio, logprobs, torch.ones(1, 2), clip_low=0.2, clip_high=0.2)
    >>> [round(x, 4) for x in surrogate.loss[0].tolist()], surrogate.clipped_high.tolist()
    ([-1.2, -0.5], [[True, False]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.algorithms.axes import Mismatch, Ratio
from posttrain.objectives.reduce import LOG_RATIO_LIMIT, row_means


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, ratio: Ratio) -> Tensor:
    """Return exp(logprobs - old_logprobs) per token, or one length-normalised ratio per sequence (2507.18071).

    All tensors are [batch, time]. The sequence ratio s is returned as sg[s] * exp(lp - sg[lp]): it has the value of s, and the gradient of
    s times the mean over its tokens.
    """
    difference = torch.where(loss_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if ratio == "token":
        return difference.exp()
    sequence = row_means(difference.detach(), loss_mask).exp()
    own = torch.where(loss_mask, logprobs - logprobs.detach(), torch.zeros_like(logprobs))
    return sequence[:, None] * own.exp()


@dataclass(frozen=True)
class SurrogateLoss:
    """Per-token loss, and where the clip removed the gradient; all [batch, time]."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def surrogate_loss(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    kind: Literal["clip", "weight"] = "clip",
    dual_clip: float | None = None,
) -> SurrogateLoss:
    """Return the per-token surrogate loss.

    clip: max(-A rho, -A clip(rho, 1 - low, 1 + high)) (1707.06347). weight: -sg[clip(rho)] A log p (2506.13585).
    dual_clip: with A < 0 the loss is at most dual_clip * |A|, so a token of very high ratio loses its gradient (1912.09729).
    """
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped_low = ratio.detach() < 1 - clip_low
    clipped_high = ratio.detach() > 1 + clip_high
    if kind == "weight":
        return SurrogateLoss(-bounded.detach() * advantages * logprobs, clipped_low, clipped_high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    clipped_high = clipped_high & (advantages > 0)
    if dual_clip is not None:
        beyond = (advantages < 0) & (ratio.detach() > dual_clip)
        loss, clipped_high = torch.where(beyond, -dual_clip * advantages, loss), clipped_high | beyond
    return SurrogateLoss(loss, clipped_low & (advantages < 0), clipped_high)


def mismatch_weight(
    old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, how: Mismatch, cap: float
) -> Tensor:
    """Return the weight [batch, time] that corrects for a sampler that differs from the policy.

    w = exp(old - rollout) of each token, or with seq_ the product over the tokens of an answer, the same for each of them.
    truncate: min(w, cap), as in truncated importance sampling. mask: w inside [1/cap, cap] and 0 outside (IcePop, 2510.18855).
    """
    difference = torch.where(loss_mask, old_logprobs - rollout_logprobs, torch.zeros_like(old_logprobs))
    if how == "none":
        return torch.ones_like(difference)
    if how in ("seq_truncate", "seq_mask"):
        difference = difference.sum(-1, keepdim=True).expand(difference.shape)
    weight = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if how in ("truncate", "seq_truncate"):
        return weight.clamp(max=cap)
    return torch.where((weight >= 1 / cap) & (weight <= cap), weight, torch.zeros_like(weight))
