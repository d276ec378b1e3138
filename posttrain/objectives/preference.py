"""Losses for pairs (the reward model, and the DPO family by link, target, weight and offset) and for single answers (KTO).

Example:
    At the start of DPO the log-ratios are 0 and the loss is ln 2; with beta * difference = 1 it is ln(1 + 1/e):

    >>> from posttrain.algorithms.dpo import DPO
    >>> [round(x, 4) for x in preference_loss(torch.tensor([0.0, 10.0]), torch.zeros(2), DPO).tolist()]
    [0.6931, 0.3133]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.algorithms.specs import Preference, Unpaired
from posttrain.objectives.reduce import row_means, row_sums


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, target: Tensor, center: float) -> Tensor:
    """Return the reward model's loss [pairs]: -p log sigma(x) - (1-p) log sigma(-x) + center * (r_w + r_l)^2 (2312.09244).

    Here x = r_w - r_l - margin, and p = target is the probability that `chosen` is better. All tensors are [pairs].
    """
    return logistic(chosen - rejected - margin, target) + center * (chosen + rejected).square()


def answer_logits(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, spec: Preference) -> Tensor:
    """Return the number [batch] by which answers are compared: sum or mean of the log-ratio, or the log-odds of the mean (2403.07691)."""
    if spec.logit == "sum":
        return row_sums(logprobs - ref_logprobs, mask)
    mean = row_means(logprobs - ref_logprobs, mask)
    if spec.logit == "mean":
        return mean
    # log p - log(1 - p); the clamp keeps the odds of a certain answer finite
    mean = mean.clamp(max=-1e-6)
    return mean - (-mean.expm1()).log()


def preference_loss(difference: Tensor, score_gap: Tensor, spec: Preference) -> Tensor:
    """Return the loss [pairs] before the pair weight.

    Args:
        difference: [pairs] (log-ratio of chosen) - (log-ratio of rejected), of sums or of means depending on `spec.logit`.
        score_gap: [pairs] chosen_score - rejected_score; only the score weightings use it.
    """
    if spec.link == "square":
        return (difference - 1 / (2 * spec.beta)).square()
    logit = spec.beta * difference - spec.target_margin
    if spec.score_weighting == "offset":
        logit = logit - spec.score_scale * score_gap
    if spec.link == "hinge":
        smoothing = spec.label_smoothing
        wrong = relu(1 + logit)
        if spec.robust:
            return ((1 - smoothing) * relu(1 - logit) - smoothing * wrong) / (1 - 2 * smoothing)
        return (1 - smoothing) * relu(1 - logit) + smoothing * wrong
    if spec.robust:
        smoothing = spec.label_smoothing
        return ((1 - smoothing) * -logsigmoid(logit) + smoothing * logsigmoid(-logit)) / (1 - 2 * smoothing)
    return logistic(logit, preference_target(score_gap, spec))


def preference_target(score_gap: Tensor, spec: Preference) -> Tensor:
    """Return the probability [pairs] that the chosen answer is better: 1 - label_smoothing, or sigma(eta * score gap)."""
    if spec.score_weighting == "soft":
        return torch.sigmoid(spec.score_scale * score_gap)
    return torch.full_like(score_gap, 1 - spec.label_smoothing)


def logistic(logit: Tensor, target: Tensor) -> Tensor:
    """Return -p log sigma(x) - (1-p) log sigma(-x), same shape as `logit`."""
    return -target * logsigmoid(logit) - (1 - target) * logsigmoid(-logit)


def unpaired_loss(log_ratio: Tensor, baseline: Tensor, desirable: Tensor, spec: Unpaired) -> Tensor:
    """Return the loss [batch] of KTO (2402.01306, eq. 8): w * (1 - sigma(+-beta * (r - z0))), + for desirable answers.

    Args:
        log_ratio: [batch] sums of log pi - log ref.
        baseline: [batch] z0, the KL to the reference; no gradient.
        desirable: [batch] bool.
    """
    gain = spec.beta * (log_ratio - baseline)
    up, down = (torch.full_like(gain, weight) for weight in (spec.desirable_weight, spec.undesirable_weight))
    return torch.where(desirable, up, down) * torch.sigmoid(torch.where(desirable, -gain, gain))
